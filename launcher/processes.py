"""This process's place among the others: rank, device, and the first handshake. The only reader of rank variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from biroute.configs.errors import UserError
from biroute.configs.schema import TrainConfig

RENDEZVOUS_FILE = "BIROUTE_RENDEZVOUS_FILE"


@dataclass(frozen=True)
class Place:
    """Rank among all processes, rank on this machine, device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join_processes(train: TrainConfig) -> Place:
    """Meet the other ranks and choose this one's device. Collective.

    Raises:
        UserError: no GPU where one was asked for, a rank variable missing, or the port is taken.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error})") from None
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it
    device = _choose_device(train.device, local_rank)
    if train.threads_per_rank:
        torch.set_num_threads(train.threads_per_rank)
    _handshake(rank, world_size, "nccl" if device.type == "cuda" else "gloo")
    return Place(rank, local_rank, world_size, device)


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch sees no GPU here; use train.device=auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}; start one process per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _handshake(rank: int, world_size: int, backend: str) -> None:
    file = os.environ.get(RENDEZVOUS_FILE)
    if file is None and "MASTER_ADDR" not in os.environ:
        raise UserError("RANK is set but MASTER_ADDR is not; set MASTER_ADDR and MASTER_PORT, or unset RANK")
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{Path(file).resolve()}" if file else "env://",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = "is in use" if "EADDRINUSE" in str(error) or "address already in use" in str(error) else str(error)
        raise UserError(f"rendezvous at MASTER_ADDR:MASTER_PORT = {address}: {reason}; use another port") from None
