"""Checkpoints: written atomically, verified before use, read by any layout.

    <run>/checkpoints/step-00000200/
        meta.json                       step, data position, model, layout, files with size and SHA-256
        weights-pipe00-tensor00-part00.pt   name -> weight, exp_avg, exp_avg_sq (fp32)
        random-rank00000.pt             random state of each rank

Parameters are saved under names that no layout changes. The data ranks of one (pipe, tensor) place share out the
writing: part i is what data rank i wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biroute.configs.errors import DISK_FULL, FencedError, UsageError
from biroute.parallel.checkpoint.files import (
    FORMAT,
    META,
    PARTIAL,
    PREFIX,
    Owner,
    check_same_model,
    fingerprint,
    list_checkpoints,
    prune,
    read_meta,
    sync_folder,
)
from biroute.parallel.engine.engine import Engine


@dataclass(frozen=True)
class Progress:
    """How far training has come; with the weights, all that a run needs to go on."""

    step: int  # optimizer steps done
    sequences: int  # global position in the data
    evaluation_pending: bool = False  # a stop cut off the evaluation that is due after this step


def save_checkpoint(
    engine: Engine, directory: Path, progress: Progress, about: dict[str, Any], keep: int, owner: Owner | None = None
) -> Path:
    """Write `step-<n>` under `directory`, then remove all but the `keep` newest. Collective.

    `about` goes into meta.json; `about["model"]` is what a loading run is checked against. The folder gets its name
    only when every file in it is complete and on disk, and if `owner` still owns the run.

    Raises:
        UsageError: the disk is full or not writable; older checkpoints are untouched.
        FencedError: another attempt owns the run; on all ranks, and nothing that it sees has changed.
    """
    final = directory / f"{PREFIX}{progress.step:08d}"
    # Each attempt has its own: one that is about to be refused must not touch another's.
    partial = final.with_name(f"{final.name}.attempt-{owner.attempt if owner else 0:04d}{PARTIAL}")
    problem = _agree(_make_folder(partial) if dist.get_rank() == 0 else None)
    written: dict[str, Any] = {}
    if problem is None:
        try:
            written = _write_rank_files(engine, partial)
        except OSError as error:
            problem = _explain_write(error, partial)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, written))
    problem = next((found for found, _ in everyone if found), None)
    if problem is None and dist.get_rank() == 0:
        try:
            _write_meta(partial, progress, about, [files for _, files in everyone])
            with owner.writing() if owner else contextlib.nullcontext():
                _publish(partial, final)
                prune(directory, keep)
        except OSError as error:
            problem = _explain_write(error, partial)
        except FencedError as error:
            problem = error
    problem = _agree(problem)
    if problem is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise problem
    return final


def load_checkpoint(
    engine: Engine, directory: Path, about: dict[str, Any], say: Callable[[str], None]
) -> Progress | None:
    """Load the newest valid checkpoint under `directory`; None if there is none. Collective.

    Damaged ones are passed over, each with a line to `say`.

    Raises:
        UsageError: the newest valid checkpoint is of another model, or there are only damaged ones.
    """
    damaged = []
    for path in list_checkpoints(directory):
        problem = verify_checkpoint(path)
        if problem is not None:
            damaged.append(problem)
            if dist.get_rank() == 0:
                say(f"{problem}; trying the one before it")
            continue
        meta = read_meta(path)
        check_same_model(path, meta["about"]["model"], about["model"])
        _read_rank_files(engine, path, meta)
        return Progress(**meta["progress"])
    if damaged:
        raise UsageError(f"{directory}: no checkpoint is valid; restore one, or remove the folder to start anew")
    return None


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None. Collective: the ranks share out the reading."""
    problem = None
    try:
        meta = read_meta(path)
        files = sorted(meta["files"].items())
        for name, expected in files[dist.get_rank() :: dist.get_world_size()]:
            if fingerprint(path / name) != expected:
                problem = f"{path / name}: size or checksum differs from {META}"
                break
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{path}: unreadable checkpoint ({type(error).__name__}: {error})"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return next((found for found in everyone if found), None)


def _write_rank_files(engine: Engine, folder: Path) -> dict[str, dict[str, Any]]:
    """Write this rank's files; their fingerprints, and where each parameter of this rank is."""
    mesh = engine.mesh
    part, parts = mesh.groups.dp_cp.rank(), mesh.groups.dp_cp.size()
    mine = {}
    for position, (name, parameter) in enumerate(engine.named_parameters()):
        state = engine.state.read(parameter)  # collective: every data rank takes part, one keeps it
        if position % parts == part:
            mine[name] = {
                "state": state,
                "split": (
                    (getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_stride", 1))
                    if getattr(parameter, "tensor_model_parallel", False)
                    else None
                ),
            }
    weights = f"weights-pipe{mesh.at.pipe:02d}-tensor{mesh.at.tensor:02d}-part{part:02d}.pt"
    random = f"random-rank{mesh.rank:05d}.pt"
    _write(folder / weights, mine)
    _write(folder / random, _random_state())
    return {
        "files": {name: fingerprint(folder / name) for name in (weights, random)},
        "parameters": {name: [mesh.at.tensor, weights, entry["split"]] for name, entry in mine.items()},
    }


def _write_meta(partial: Path, progress: Progress, about: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    parameters: dict[str, Any] = {}
    for rank in ranks:
        for name, (tensor_rank, file, split) in rank["parameters"].items():
            entry = parameters.setdefault(name, {"files": {}, "split": split})
            entry["files"][str(tensor_rank)] = file
    meta = {
        "format": FORMAT,
        "progress": vars(progress),
        "about": about,
        "files": {name: print_ for rank in ranks for name, print_ in rank["files"].items()},
        "parameters": parameters,
    }
    with open(partial / META, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    sync_folder(final.parent)


def _read_rank_files(engine: Engine, path: Path, meta: dict[str, Any]) -> None:
    opened: dict[str, Any] = {}

    def entry(name: str, tensor_rank: int) -> dict[str, Tensor]:
        file = meta["parameters"][name]["files"][str(tensor_rank)]
        if file not in opened:
            opened[file] = torch.load(path / file, map_location="cpu", mmap=True, weights_only=True)
        return opened[file][name]["state"]

    tensor_size = engine.mesh.layout.tensor
    for name, parameter in engine.named_parameters():
        saved = meta["parameters"][name]
        ranks = sorted(int(rank) for rank in saved["files"])
        if len(ranks) == tensor_size or saved["split"] is None:
            state = entry(name, engine.mesh.at.tensor if len(ranks) == tensor_size else ranks[0])
        else:
            shards = [entry(name, rank) for rank in ranks]
            dim, stride = saved["split"]
            state = {
                key: reshard([shard[key] for shard in shards], dim, stride, tensor_size)[engine.mesh.at.tensor]
                for key in shards[0]
            }
        engine.state.write(parameter, state)
    engine.state.finish_writing(meta["progress"]["step"])
    random = path / f"random-rank{engine.mesh.rank:05d}.pt"
    if random.exists():
        _set_random_state(torch.load(random, map_location="cpu", weights_only=True))


def reshard(shards: list[Tensor], dim: int, stride: int, parts: int) -> list[Tensor]:
    """Cut the tensor whose tensor-parallel `shards` are given into `parts` others.

    With stride 2 (SwiGLU's gate and up projections) a shard is [its gate rows; its up rows].
    """
    pieces = [shard.chunk(stride, dim) for shard in shards]
    whole = [torch.cat([piece[turn] for piece in pieces], dim) for turn in range(stride)]
    cut = [full.chunk(parts, dim) for full in whole]
    return [torch.cat([cut[turn][part] for turn in range(stride)], dim) for part in range(parts)]


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write(path: Path, content: Any) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # After a write that failed, torch.save complains about its archive; the cause stands behind it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _make_folder(path: Path) -> UsageError | None:
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        return _explain_write(error, path)
    return None


def _explain_write(error: OSError, path: Path) -> UsageError:
    cause = "the disk is full" if error.errno in DISK_FULL else str(error)
    return UsageError(
        f"{path}: could not save the checkpoint ({cause}); the checkpoints before it are untouched: "
        "free some space and run again"
    )


def _agree(problem: Exception | None) -> Exception | None:
    """Rank 0's answer, on every rank."""
    answer = [problem]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]
