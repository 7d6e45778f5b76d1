"""Save a checkpoint: written by all ranks, published by one rename.

    <run>/checkpoints/step-00000200/
        meta.json                           progress, model, files with size and SHA-256, where each parameter is
        weights-pipe00-tensor00-part00.pt   name -> weight, exp_avg, exp_avg_sq (fp32)

Parameters are saved under names that no layout changes. The data ranks of one (pipe, tensor) position split the
writing: part i is what data rank i wrote.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist

from biroute.configs.errors import DISK_FULL, DivergedError, FencedError, UsageError
from biroute.configs.files import HashingWriter, new_file, sync_folder, write_atomically
from biroute.parallel.checkpoint.files import Owner, folder_of_step, prune, unfinished_folder
from biroute.parallel.checkpoint.meta import (
    META_NAME,
    CheckpointMeta,
    Fingerprint,
    ParameterFiles,
    TrainingProgress,
    read_meta,
)
from biroute.parallel.engine.engine import Engine
from biroute.parallel.messages import any_rank, broadcast_message, gather_messages

PIECE_BYTES = 256 << 20  # of a file, after which it is synced and the save counts as having progressed
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class SaveError(UsageError):
    """A checkpoint could not be written, for a reason that may pass."""


def save_checkpoint(
    engine: Engine,
    directory: Path,
    progress: TrainingProgress,
    about: dict[str, Any],
    keep: int,
    *,
    kept: bool = False,
    owner: Owner | None = None,
    reached: Callable[[], None] = lambda: None,
) -> Path:
    """Write `step-<n>` under `directory`, then remove all but the `keep` newest. Collective.

    With `kept`, no later save removes this one.

    `about` goes into meta.json; `about["model"]` is what a loading run is checked against. The folder gets its name
    only when every file in it is complete and on disk, and if `owner` still owns the run. `reached` is called on all
    ranks after every parameter that is read, and then for every piece that any of them has written: a long save is
    no hang, neither for those that write nor for those that wait for them.

    Raises:
        SaveError: the disk refused, perhaps only for now; older checkpoints are untouched.
        UsageError: the disk is not writable; the same.
        DivergedError: a weight or moment is not finite; older checkpoints are untouched.
        FencedError: another attempt owns the run; on all ranks, and nothing that it sees has changed.
    """
    final = folder_of_step(directory, progress.step)
    partial = unfinished_folder(directory, progress.step, owner.attempt if owner else 0)
    problem = _agree(_make_folder(partial) if dist.get_rank() == 0 else None)
    written: dict[str, Any] = {}
    if problem is None:
        pace = _Pace(reached)
        try:
            written = _write_rank_files(engine, partial, reached, pace.piece_written)
        except DivergedError as error:
            problem = error
        except OSError as error:
            problem = _explain_write(error, partial)
        pace.wait_for_others()
    everyone = gather_messages((_to_message(problem), written))
    problem = next((_from_message(found) for found, _ in everyone if found), None)
    if problem is None and dist.get_rank() == 0:
        try:
            _write_meta(partial, progress, about, kept, [files for _, files in everyone])
            with owner.writing() if owner else contextlib.nullcontext():
                _publish(partial, final)
                prune(directory, keep, progress.step)
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


def note_evaluation(path: Path, owner: Owner) -> None:
    """Record in a checkpoint that the evaluation after its step is done, so that a resume does not repeat it.

    Raises:
        OSError: the file could not be written; the checkpoint is as it was.
        ValueError: its meta.json is damaged.
        FencedError: another attempt owns the run.
    """
    with owner.writing():
        meta = read_meta(path)
        progress = meta.progress.model_copy(update={"evaluation_pending": False})
        write_atomically(path / META_NAME, _json(meta.model_copy(update={"progress": progress})))


class _Pace:
    """Keeps the ranks of a save in step, piece by piece, so that each of them sees whether any still progresses."""

    def __init__(self, reached: Callable[[], None]) -> None:
        self._reached = reached

    def piece_written(self) -> None:
        """Report that this rank has written a piece, and has more to write. Collective, with either method."""
        any_rank(True)
        self._reached()

    def wait_for_others(self) -> None:
        """Report that this rank is done, until all ranks are. Collective, with either method."""
        while any_rank(False):
            self._reached()


def _write_rank_files(
    engine: Engine, folder: Path, reached: Callable[[], None], piece_written: Callable[[], None]
) -> dict[str, Any]:
    """Write this rank's files; returns their fingerprints, and where each parameter of this rank is.

    Raises:
        DivergedError: a value that this rank keeps is not finite.
        OSError: the disk refused.
    """
    mesh = engine.mesh
    part, parts = mesh.groups.dp_cp.rank(), mesh.groups.dp_cp.size()
    mine, infinite = {}, list[str]()
    for position, (name, parameter) in enumerate(engine.named_parameters()):
        if getattr(parameter, "ds_pipe_replicated", False):
            continue  # a tied weight, which the first stage saves
        # Collective: every data rank takes part, one keeps it.
        keep = position % parts == part
        state = engine.state.read(parameter, keep)
        reached()
        infinite += [f"{kind} of {name}" for kind, value in state.items() if not value.isfinite().all()]
        if keep:
            mine[name] = {
                "state": state,
                "split": (
                    (getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_stride", 1))
                    if getattr(parameter, "tensor_model_parallel", False)
                    else None
                ),
            }
    if infinite:  # only now, because reading is collective
        raise DivergedError(
            f"{infinite[0]} is not finite, so no checkpoint is written: resume from an older one with a lower "
            "optim.learning_rate, or look at the data since then"
        )
    file = f"weights-pipe{mesh.at.pipe:02d}-tensor{mesh.at.tensor:02d}-part{part:02d}.pt"
    return {
        "files": {file: write_file(folder / file, mine, piece_written).model_dump()},
        "parameters": {name: (mesh.at.tensor, file, entry["split"]) for name, entry in mine.items()},
    }


def _write_meta(
    partial: Path, progress: TrainingProgress, about: dict[str, Any], kept: bool, ranks: list[dict[str, Any]]
) -> None:
    places: dict[str, dict[int, str]] = {}
    splits: dict[str, tuple[int, int] | None] = {}
    for rank in ranks:
        for name, (tensor_rank, file, split) in rank["parameters"].items():
            places.setdefault(name, {})[tensor_rank] = file
            splits[name] = split
    meta = CheckpointMeta(
        progress=progress,
        about=about,
        kept=kept,
        files={name: found for rank in ranks for name, found in rank["files"].items()},
        parameters={name: ParameterFiles(files=files, split=splits[name]) for name, files in places.items()},
    )
    write_atomically(partial / META_NAME, _json(meta))


def _json(meta: CheckpointMeta) -> bytes:
    return json.dumps(meta.model_dump(mode="json"), indent=1).encode("utf-8")


def _publish(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    sync_folder(final.parent)


class _PieceWriter(HashingWriter):
    """Syncs each piece before the next, as a sync of a whole file may take as long as a hang."""

    def __init__(self, file: BinaryIO, piece_written: Callable[[], None]) -> None:
        super().__init__(file)
        self._piece_written = piece_written
        self._end_of_piece = PIECE_BYTES

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data)
        while rest:
            part = rest[: self._end_of_piece - self.size_bytes]
            super().write(part)
            rest = rest[len(part) :]
            if self.size_bytes == self._end_of_piece:
                self.sync()
                self._end_of_piece += PIECE_BYTES
                self._piece_written()
        return len(data)


def write_file(path: Path, content: Any, piece_written: Callable[[], None] = lambda: None) -> Fingerprint:
    """Write a torch file, durably; returns its size and checksum. `piece_written` is called every 256 MiB.

    Raises:
        OSError: the disk refused, wherever in the file that was.
    """
    try:
        with new_file(path) as file:
            writer = _PieceWriter(file, piece_written)
            torch.save(content, cast(IO[bytes], writer))  # it calls nothing but write and flush
            writer.sync()
    except RuntimeError as error:
        # After a write that failed, torch.save complains about its archive; the cause stands behind it.
        if isinstance(error.__context__, Exception):
            raise error.__context__ from None
        raise
    return Fingerprint(bytes=writer.size_bytes, sha256=writer.sha256)


def _make_folder(path: Path) -> UsageError | None:
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        return _explain_write(error, path)
    return None


def _explain_write(error: OSError, path: Path) -> UsageError:
    full = error.errno in DISK_FULL
    cause = "the disk is full" if full else str(error)
    remedy = "free some space" if full else "make train.run_dir writable for every rank"
    kind = UsageError if error.errno in _LASTING else SaveError
    return kind(
        f"{path}: could not save the checkpoint ({cause}); the checkpoints before it are untouched: {remedy} and run "
        "the same command again"
    )


def _agree(problem: Exception | None) -> Exception | None:
    """Rank 0's answer, on every rank."""
    return _from_message(broadcast_message(_to_message(problem)))


_PROBLEMS = {kind.__name__: kind for kind in (UsageError, SaveError, DivergedError, FencedError)}


def _to_message(problem: Exception | None) -> list[str] | None:
    return None if problem is None else [type(problem).__name__, str(problem)]


def _from_message(message: list[str] | None) -> Exception | None:
    return None if message is None else _PROBLEMS[message[0]](message[1])
