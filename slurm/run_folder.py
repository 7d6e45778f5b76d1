"""What a run's folder shows about the run, and how a user names a run: folder, configuration or job. No torch."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.configs.records import last_lines, parse_json, read_small
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import (
    CANCELLED,
    CODE,
    CONFIG,
    EVALUATE_SCRIPT,
    JOBS,
    JOURNAL,
    LEFT_NODES,
    METRICS_LOG,
    SCRIPT,
    SUBMISSION,
)
from biroute.launcher.track.metrics_log import Point, scan
from biroute.slurm import client

_TAIL_BYTES = 65_536
_LEFT_NODES_SHOWN = 5
_RUNS = Path("runs")  # where runs are searched if none is named


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. Every call reads the files again."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def script(self) -> Path:
        return self.path / SUBMISSION / SCRIPT

    @property
    def cancelled_mark(self) -> Path:
        return self.path / SUBMISSION / CANCELLED

    def config(self) -> RunConfig | None:
        """Load the resolved configuration; None if it is not there yet or this version can't read it."""
        for path in (self.path / SUBMISSION / CONFIG, self.path / CONFIG):
            with contextlib.suppress(UsageError):
                return load_config(path)
        return None

    def missing(self) -> Path | None:
        """Return what its job needs of the submission and does not find; None if all is there."""
        submission = self.path / SUBMISSION
        needed = (submission, submission / CODE, submission / CONFIG)
        return next((path for path in needed if not path.exists()), None)

    def job_ids(self) -> list[str]:
        """Return the ids of all jobs of this run, oldest first, including those that were submitted by hand."""
        found: dict[str, None] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in read_small(self.path / SUBMISSION / JOBS).decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found[str(parse_json(line)["job_id"])] = None
        for attempt in read_attempts(self.path):
            if attempt.job is not None:
                found[attempt.job] = None
        return list(found)

    def left_nodes(self) -> list[str]:
        """Return a line for each time that a job had to leave a node before an attempt could begin there."""
        with contextlib.suppress(OSError):
            return last_lines(self.path / SUBMISSION / LEFT_NODES, _LEFT_NODES_SHOWN)
        return []

    def jobs(self) -> list[client.Job]:
        """Ask Slurm for the jobs of this run, also if it is another user's.

        Raises:
            UsageError: Slurm is not available or does not answer.
        """
        if self.stranger() is None:
            return self.jobs_in(client.queue())
        return client.queue(ids) if (ids := self.job_ids()) else []

    def jobs_in(self, queue: list[client.Job]) -> list[client.Job]:
        """Return the jobs in `queue` that belong to this run; a stranger's folder cannot name a job of this user."""
        ids = set(self.job_ids()) if self.stranger() is None else set()
        return [job for job in queue if job.script == self.script or job.job_id in ids]

    def evaluations_in(self, queue: list[client.Job]) -> list[client.Job]:
        """Return the jobs in `queue` that evaluate this run beside its training."""
        return [job for job in queue if job.script == self.path / SUBMISSION / EVALUATE_SCRIPT]

    def stranger(self) -> tuple[Path, str] | None:
        """Return what of this folder belongs to another user, and that user's name; None if all is ours."""
        for path in (self.path, self.path / SUBMISSION, self.script):
            with contextlib.suppress(FileNotFoundError):
                owner = path.lstat().st_uid
                if owner != os.geteuid():
                    return path, _user_name(owner)
        return None

    def check_ours(self, verb: str) -> None:
        """Refuse to act on a run of somebody else, whose script could do anything in this user's name.

        Raises:
            UsageError: the folder, its submission or its script belongs to another user.
        """
        if (found := self.stranger()) is not None:
            raise UsageError(
                f"{found[0]} belongs to {found[1]}, who alone may {verb} this run; to train on from it, submit a run "
                "of your own, after `biroute checkpoint copy`"
            )

    def last_point(self) -> Point | None:
        """Return the metrics of the newest logged training step; None if there are none."""
        path = self.path / METRICS_LOG
        try:
            start = max(0, path.stat().st_size - _TAIL_BYTES)
            points = [point for point, _ in scan(path, start) if point is not None and "train/loss" in point.metrics]
        except OSError:
            return None
        return points[-1] if points else None


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def is_run(path: Path) -> bool:
    """Return whether anything was ever submitted or trained in this folder."""
    return any((path / name).exists() for name in (SUBMISSION, JOURNAL, METRICS_LOG))


def find_run(target: str) -> RunFolder:
    """Find the run that a user names by a run folder, a configuration file or a job id.

    Raises:
        UsageError: there is no such run, or the job is not a BiRoute job.
    """
    path = Path(target)
    if path.is_dir():
        if not is_run(path):
            raise UsageError(
                _of_gone_run(path) or f"{target} holds no run; name a run folder, a configuration or a job id"
            )
        return RunFolder(path.resolve())
    if target.isdigit():
        return _run_of_job(target)
    if path.suffix in (".yaml", ".yml"):
        run_dir = load_config(path).train.run_dir
        if not is_run(run_dir):
            raise UsageError(
                _of_gone_run(run_dir)
                or f"{target}: its run folder {run_dir} holds no run; submit it with `biroute submit {target}`"
            )
        return RunFolder(run_dir.resolve())
    raise UsageError(
        _of_gone_run(path) or f"{target}: no such run folder, configuration or job; `biroute status` lists the runs"
    )


def known_runs(queue: list[client.Job] | None) -> list[RunFolder]:
    """Return the runs of this user's jobs, `queue`, and those in ./runs; without Slurm (None), only the latter."""
    found = {folder.resolve() for folder in _RUNS.glob("*/") if is_run(folder)}
    found |= {run for job in queue or [] if (run := _run_of_script(job.script)) is not None}
    return [RunFolder(path) for path in sorted(found)]


def told_gone(queue: list[client.Job] | None) -> list[str]:
    """Return a line for each job in `queue` whose run folder was deleted or moved."""
    return [line for job in queue or [] if (line := _gone(job))]


def _gone(job: client.Job) -> str:
    """Say that the run folder of a job was deleted or moved, and what ends the job; "" if it is there or no run's."""
    folder = _folder_of_script(job.script)
    if folder is None or is_run(folder):
        return ""
    what = f"job {job.job_id}, {job.state}: its run folder {folder} was deleted or moved"
    return f"{what}; `scancel {job.job_id}` ends the job" if job.live else f"{what}, and the job has ended"


def _of_gone_run(path: Path) -> str:
    """Say which jobs of this user wait for a run folder that is gone; "" if none does, or Slurm does not answer."""
    with contextlib.suppress(UsageError):
        queue = client.queue(seconds=client.LOOK_SECONDS)
        return "; ".join(told_gone([job for job in queue if _folder_of_script(job.script) == path.resolve()]))
    return ""


def _run_of_job(job_id: str) -> RunFolder:
    unreachable: UsageError | None = None
    try:
        job = client.find_job(job_id)
        folder = _run_of_script(job.script) if job else None
        if folder is not None:
            return RunFolder(folder)
    except UsageError as error:
        unreachable, job = error, None
    for run in _local_runs():  # Slurm forgets a job some minutes after its end
        with contextlib.suppress(OSError, UsageError):  # one that cannot be read must not hide the others
            if job_id in run.job_ids():
                return run
    if unreachable is not None:
        raise unreachable
    if job is not None and (gone := _gone(job)):
        raise UsageError(gone)
    what = "is not a BiRoute job" if job else "is not known to Slurm"
    raise UsageError(f"job {job_id} {what}; `biroute status` lists the runs")


def _run_of_script(script: Path | None) -> Path | None:
    folder = _folder_of_script(script)
    return folder if folder is not None and is_run(folder) else None


def _folder_of_script(script: Path | None) -> Path | None:
    """Return the run folder in which a batch script lay when it was submitted; None if it is not BiRoute's."""
    if script is None or script.parent.name != SUBMISSION or script.name not in (SCRIPT, EVALUATE_SCRIPT):
        return None
    return script.parent.parent


def _local_runs() -> Iterator[RunFolder]:
    yield from (RunFolder(path.resolve()) for path in sorted(_RUNS.glob("*/")) if is_run(path))
