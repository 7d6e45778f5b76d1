"""Load the newest checkpoint that verifies into an engine of any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.parallel.checkpoint.files import check_same_run, fingerprint, list_checkpoints
from biroute.parallel.checkpoint.meta import META_NAME, CheckpointMeta, TrainingProgress, read_meta
from biroute.parallel.checkpoint.reshard import reshard
from biroute.parallel.engine.engine import Engine
from biroute.parallel.messages import gather_messages


def load_checkpoint(
    engine: Engine, directory: Path, about: dict[str, Any], report: Callable[[str], None]
) -> TrainingProgress | None:
    """Load the newest valid checkpoint under `directory`; None if there is none. Collective.

    Damaged ones are passed over, each with a line to `report` on rank 0.

    Raises:
        UsageError: the newest valid checkpoint is of another model or run, or there are only damaged ones.
    """
    damaged = []
    for path in list_checkpoints(directory):
        problem = verify_checkpoint(path, [name for name, _ in engine.named_parameters()])
        if problem is not None:
            damaged.append(problem)
            if dist.get_rank() == 0:
                report(f"{problem}; trying the one before it")
            continue
        meta = read_meta(path)
        for line in check_same_run(path, meta.about, about):
            report(line)
        _read_parameters(engine, path, meta)
        return meta.progress
    if damaged:
        raise UsageError(f"{directory}: no checkpoint is valid; restore one, or remove the folder to start again")
    return None


def verify_checkpoint(path: Path, names: Sequence[str]) -> str | None:
    """Check every file of a checkpoint, and that it has the parameters `names`, which may differ between ranks.

    Returns what is wrong with it, or None. Collective: the ranks split the reading.
    """
    problem = None
    try:
        meta = read_meta(path)
        missing = [name for name in names if name not in meta.parameters]
        if missing:
            problem = f"{path}: {META_NAME} does not say where {missing[0]} is"
        files = sorted(meta.files.items())
        for name, expected in files[dist.get_rank() :: dist.get_world_size()]:
            if fingerprint(path / name) != expected:
                problem = f"{path / name}: size or checksum differs from {META_NAME}"
                break
    except (OSError, ValueError) as error:
        problem = f"{path}: unreadable checkpoint ({type(error).__name__}: {_first_line(error)})"
    return next((found for found in gather_messages(problem) if found), None)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _read_parameters(engine: Engine, path: Path, meta: CheckpointMeta) -> None:
    opened: dict[str, Any] = {}

    def part(name: str, tensor_rank: int) -> dict[str, Tensor]:
        file = meta.parameters[name].files[tensor_rank]
        if file not in opened:
            opened[file] = torch.load(path / file, map_location="cpu", mmap=True, weights_only=True)
        state: dict[str, Tensor] = opened[file][name]["state"]
        return state

    tensor_size, tensor_rank = engine.mesh.layout.tensor, engine.mesh.at.tensor
    for name, parameter in engine.named_parameters():
        saved = meta.parameters[name]
        ranks = sorted(saved.files)
        if len(ranks) == tensor_size or saved.split is None:
            state = part(name, tensor_rank if len(ranks) == tensor_size else ranks[0])
        else:
            shards = [part(name, rank) for rank in ranks]
            state = {
                key: reshard([shard[key] for shard in shards], *saved.split, tensor_size, tensor_rank)
                for key in shards[0]
            }
        engine.state.write(parameter, state)
    engine.state.finish_writing(meta.progress.step - meta.progress.skipped_steps)
