"""Whole weights by name from any checkpoint, whatever layout wrote it: no engine, no process group, no DeepSpeed.

What evaluates, generates, exports or inspects a trained model starts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biroute.configs.errors import UsageError
from biroute.parallel.checkpoint.files import fingerprint, list_checkpoints
from biroute.parallel.checkpoint.meta import META_NAME, CheckpointMeta, read_meta
from biroute.parallel.checkpoint.reshard import join


def newest_checkpoint(directory: Path) -> Path:
    """Find the newest checkpoint under `directory` (or `directory` itself, if it is one) whose meta.json is readable.

    Raises:
        UsageError: there is none.
    """
    if (directory / META_NAME).exists():
        return directory
    for path in list_checkpoints(directory):
        try:
            read_meta(path)
        except (OSError, ValueError):
            continue
        return path
    raise UsageError(f"{directory}: holds no readable checkpoint; train first, or name the folder of another run")


def read_weights(path: Path, *, verify: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of the checkpoint `path`, one whole tensor at a time.

    Args:
        path: the folder of one checkpoint.
        verify: compare the checksum of every file first.

    Yields:
        The name of a parameter (`block.3.layer.mlp.linear_fc1.weight`) and its fp32 weight on the CPU. A tied weight
        comes once.

    Raises:
        UsageError: a file is missing or damaged.
    """
    try:
        meta = read_meta(path)
        if verify:
            _verify(path, meta)
        yield from _joined(path, meta)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = str(error).split("\n", 1)[0]
        raise UsageError(f"{path}: damaged checkpoint ({type(error).__name__}: {text}); use another one") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into a model in one process, whose parameters have the names of the checkpoint.

    Args:
        module: with `named_weights()`, as `LayerSequence` has.
        weights: as from `dict(read_weights(path))`.

    Raises:
        UsageError: the names or shapes differ: the weights are of another model.
    """
    parameters: dict[str, nn.Parameter] = dict(module.named_weights())  # type: ignore[operator]
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise UsageError(f"weights of another model: {len(missing)} missing {missing[:3]}, unknown {unknown[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)} instead of {tuple(parameter.shape)}"
                raise UsageError(f"weights of another model: {name} is {shapes}")
            parameter.copy_(weights[name])


def _verify(path: Path, meta: CheckpointMeta) -> None:
    for name, expected in meta.files.items():
        if fingerprint(path / name) != expected:
            raise ValueError(f"{name}: size or checksum differs from {META_NAME}")


def _joined(path: Path, meta: CheckpointMeta) -> Iterator[tuple[str, Tensor]]:
    opened: dict[str, Any] = {}
    for name, saved in meta.parameters.items():
        shards = []
        for rank in sorted(saved.files):
            file = saved.files[rank]
            if file not in opened:
                opened[file] = torch.load(path / file, map_location="cpu", mmap=True, weights_only=True)
            shards.append(opened[file][name]["state"]["weight"])
        yield name, join(shards, saved.split)
