"""What checkpoints a folder holds, whether they are sound, and copies of them. No torch, no collective."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.files import new_file, sync_folder
from biroute.parallel.checkpoint.files import (
    fingerprint,
    folder_of_step,
    list_checkpoints,
    list_unfinished,
    unfinished_folder,
)
from biroute.parallel.checkpoint.meta import META_NAME, CheckpointMeta, read_meta


@dataclass(frozen=True)
class Found:
    """One checkpoint. `meta` is None if it cannot be read; `problem` is empty if nothing is wrong."""

    path: Path
    meta: CheckpointMeta | None
    saved: float  # Unix seconds
    size_bytes: int
    problem: str = ""


def survey(directory: Path, *, deep: bool) -> list[Found]:
    """Look at all checkpoints of a folder, newest first, and at those that were never finished.

    Args:
        directory: the folder `checkpoints` of a run.
        deep: compare every file with its checksum; otherwise only with its size.
    """
    found, unfinished = [], list_unfinished(directory)
    for path in (*list_checkpoints(directory), *unfinished):
        try:
            found.append(_unfinished(path) if path in unfinished else _look(path, deep))
        except FileNotFoundError:  # a run that trains has removed it just now
            continue
    return found


def copy_checkpoint(source: Path, directory: Path) -> Path:
    """Copy a checkpoint into another run's folder of checkpoints, and compare the copy with the checksums.

    Returns:
        The copy, from which that run starts.

    Raises:
        UsageError: the source is damaged, or the copy exists or cannot be written.
    """
    target = directory / source.name
    if target.exists():
        raise UsageError(f"{target} exists; remove it, or copy to another run folder")
    _check_source(source, deep=False)
    draft = unfinished_folder(directory, int(source.name.rpartition("-")[2]), 0)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name in [*read_meta(source).files, META_NAME]:
            with open(source / name, "rb") as original, new_file(draft / name) as copy:
                shutil.copyfileobj(original, copy, 1 << 20)
        problem = _look(draft, deep=True).problem
        if problem:
            _check_source(source, deep=True)  # only now: reading a large checkpoint once more takes minutes
            raise UsageError(f"{draft}: {problem} after copying; the disk there is not to be trusted")
        draft.rename(target)
        sync_folder(directory)
    except OSError as error:
        raise UsageError(f"{draft}: {error.strerror}; copy to a folder that can be written and has room") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _check_source(source: Path, deep: bool) -> None:
    if problem := _look(source, deep).problem:
        raise UsageError(f"{source}: {problem}; choose another with --step")


def checkpoint_of(directory: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, or the newest one that is complete.

    Raises:
        UsageError: there is none.
    """
    found = survey(directory, deep=False)
    if step is not None:
        path = folder_of_step(directory, step)
        if path not in [one.path for one in found]:
            steps = ", ".join(str(one.meta.progress.step) for one in found if one.meta) or "none"
            raise UsageError(f"{directory} has no checkpoint of step {step}; it has {steps}")
        return path
    for one in found:
        if not one.problem:
            return one.path
    raise UsageError(f"{directory} has no complete checkpoint; `biroute checkpoint list` shows what is there")


def _unfinished(path: Path) -> Found:
    problem = "never finished; the next save of its run removes it"
    return Found(path, None, path.stat().st_mtime, _size(path), problem)


def _look(path: Path, deep: bool) -> Found:
    try:
        meta = read_meta(path)
    except (OSError, ValueError, UsageError) as error:
        first = str(error).splitlines()[0]
        return Found(path, None, path.stat().st_mtime, _size(path), f"{META_NAME} is unreadable ({first})")
    saved = (path / META_NAME).stat().st_mtime
    problem = ""
    for name, expected in sorted(meta.files.items()):
        file = path / name
        if not file.is_file():
            problem = f"{name} is missing"
        elif file.stat().st_size != expected.bytes:
            problem = f"{name} has {file.stat().st_size} bytes, not {expected.bytes}"
        elif deep and fingerprint(file) != expected:
            problem = f"the checksum of {name} differs from {META_NAME}"
        if problem:
            break
    return Found(path, meta, saved, _size(path), problem)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
