"""The folders that checkpoints lie in: names, checks, pruning. No torch, no collective."""

from __future__ import annotations

import hashlib
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from biroute.configs.changes import compare_settings
from biroute.configs.errors import UsageError
from biroute.configs.files import open_regular
from biroute.parallel.checkpoint.meta import META_NAME, STEP_NAME, Fingerprint, RenamedError, read_meta

PREFIX = "step-"
PARTIAL = ".partial"  # ending of a folder that is being written
# Exactly the names that a save writes, as STEP_NAME: whatever else lies there belongs to the user.
_PARTIAL_NAME = re.compile(PREFIX + r"\d{8,}\.attempt-\d{4,}" + re.escape(PARTIAL))


class Owner(Protocol):
    """The attempt that writes. An older one may still be running on a lost node, and must publish nothing."""

    @property
    def attempt(self) -> int: ...

    def writing(self) -> AbstractContextManager[None]:
        """Around each change to the list of checkpoints; raises FencedError if another attempt owns the folder."""


def list_checkpoints(directory: Path) -> list[Path]:
    """List the finished checkpoints, newest first."""
    found = [path for path in directory.glob(f"{PREFIX}*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def folder_of_step(directory: Path, step: int) -> Path:
    """Return the folder of a finished checkpoint."""
    return directory / f"{PREFIX}{step:08d}"


def unfinished_folder(directory: Path, step: int, attempt: int) -> Path:
    """Return where an attempt writes a checkpoint. Each has its own: one that is refused must not touch another's."""
    return directory / f"{PREFIX}{step:08d}.attempt-{attempt:04d}{PARTIAL}"


def check_same_model(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a UsageError that names each setting in which the checkpoint's model differs from ours."""
    differing = [key for key in sorted({*saved, *ours}) if saved.get(key) != ours.get(key)]
    if differing:
        changes = ", ".join(f"{key}: {saved.get(key)} there, {ours.get(key)} here" for key in differing)
        raise UsageError(
            f"{path}: checkpoint of another model ({changes}); use its settings, or another train.run_dir"
        )


def check_same_run(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Compare what a checkpoint says of its run, `about` in its meta.json, with ours; returns what else has changed.

    Raises:
        UsageError: it is of another model, or of another run and `ours["accepted"]` does not name what differs.
    """
    check_same_model(path, saved["model"], ours["model"])
    try:
        return compare_settings(saved.get("settings", {}), ours.get("settings", {}), ours.get("accepted", []))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def check_newest(directory: Path, ours: dict[str, Any]) -> None:
    """Before any rank is started: raise a UsageError if no run may go on with the newest readable checkpoint."""
    for path in list_checkpoints(directory):
        try:
            saved = read_meta(path).about
        except (OSError, ValueError):
            continue  # loading skips it, too, and reports it
        check_same_run(path, saved, ours)
        return


def fingerprint(path: Path) -> Fingerprint:
    """Read a file's size and SHA-256."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Fingerprint(bytes=path.stat().st_size, sha256=digest)


def list_unfinished(directory: Path) -> list[Path]:
    """List the checkpoints that a save began and did not finish."""
    return sorted(path for path in directory.glob(f"{PREFIX}*{PARTIAL}") if _PARTIAL_NAME.fullmatch(path.name))


def prune(directory: Path, keep: int, newest: int) -> None:
    """Remove all but the `keep` newest checkpoints and those that are kept for ever, and what was never finished.

    Those of steps after `newest`, which was just saved, are left alone and do not count: the run has passed over
    them as damaged, and one of them must not take the place of a sound one.
    """
    saved = [path for path in list_checkpoints(directory) if _step_of(path) <= newest]
    old = [path for path in saved[keep:] if not _is_kept(path)]
    for path in [*old, *list_unfinished(directory)]:
        shutil.rmtree(path, ignore_errors=True)


def _is_kept(path: Path) -> bool:
    try:
        return read_meta(path).kept
    except RenamedError:
        return True  # by its owner
    except ValueError:  # damaged
        return False
    except (OSError, UsageError):  # who knows
        return (path / META_NAME).exists()
