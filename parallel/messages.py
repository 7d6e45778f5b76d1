"""Small messages between ranks, as JSON: torch's object collectives unpickle, and a pickle can run code."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.configs.records import parse_json

_LARGEST_BYTES = 64 << 20  # what a size on the wire may make a rank allocate


def gather_messages(message: Any) -> list[Any]:
    """Send a message of plain JSON values to every rank; returns all messages, by rank. Collective.

    Tuples arrive as lists, and keys of dictionaries must be text.

    Raises:
        ValueError: a message is larger than 64 MiB, or is no JSON.
    """
    content = _encode(message)
    sizes = [torch.zeros(1, dtype=torch.int64, device=content.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)], device=content.device))
    lengths = [int(size) for size in torch.cat(sizes).tolist()]
    longest = _checked(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=content.device)
    padded[: len(content)] = content
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded)
    return [_decode(data[:length]) for data, length in zip(received, lengths, strict=True)]


def broadcast_message(message: Any) -> Any:
    """Return rank 0's message on every rank; what the others give is ignored. Collective.

    Raises:
        ValueError: as in `gather_messages`.
    """
    content = _encode(message if dist.get_rank() == 0 else None)
    size = torch.tensor([len(content)], device=content.device)
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        content = torch.empty(_checked(int(size)), dtype=torch.uint8, device=content.device)
    dist.broadcast(content, src=0)
    return _decode(content)


def any_rank(flag: bool) -> bool:
    """Return on every rank whether `flag` is true on any. Collective."""
    found = _on_device(torch.tensor([flag], dtype=torch.uint8))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def _encode(message: Any) -> Tensor:
    return _on_device(torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8))


def _on_device(content: Tensor) -> Tensor:
    return content.cuda() if dist.get_backend() == "nccl" else content


def _decode(content: Tensor) -> Any:
    return parse_json(content.cpu().numpy().tobytes())


def _checked(size: int) -> int:
    if not 0 <= size <= _LARGEST_BYTES:
        raise ValueError(f"a rank announces a message of {size} bytes; at most {_LARGEST_BYTES} are accepted")
    return size
