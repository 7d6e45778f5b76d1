"""A thin client of Slurm's commands. Every call has a timeout. Text output is parsed: the JSON differs by version."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from biroute.configs.errors import UsageError

TIMEOUT_SECONDS = 30.0
LOOK_SECONDS = 10.0  # for what a command can do without
SUBMIT_SECONDS = 120.0  # a busy controller may take long, and what it does then is not undone
CANCEL_PAUSES = (1.0, 3.0, 0.0)  # seconds after each try
UNCLEAR_PAUSES = (1.0, 4.0, 10.0)  # seconds between looks for a job whose submission had no clear answer
_UNCLEAR = re.compile(
    r"timed out|Zero Bytes|Unexpected message|communication|connection (reset|failure)", re.IGNORECASE
)
_SEPARATOR = "\x1f"  # a character that no field contains
_NOTE = "BiRoute: "  # begins a job's comment that its batch script wrote
_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT")


@dataclass(frozen=True)
class Job:
    """A job as reported by the controller or the accounting database."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED ...
    script: Path | None = None  # the batch script, if it is known
    time_left: str = ""  # until its time limit, in squeue's format
    reason: str = ""  # why it is pending
    nodes: str = ""
    exit_code: str = ""
    submitted: str = ""  # local time, such as 2026-11-27T17:30:00
    begins: str = ""  # when it began, or is expected to; "" if Slurm does not say
    note: str = ""  # what its batch script could write nowhere else, such as where it does not see the run folder

    @property
    def live(self) -> bool:
        """Whether the job is queued or running."""
        return self.state in _LIVE


class NoAnswerError(UsageError):
    """Slurm is installed and does not answer."""


class UnclearError(UsageError):
    """Slurm was asked for something and gave no clear answer, so that it may have done it."""


def submit(script: Path, after: str | None = None) -> str:
    """Submit a batch script and return the job's id. After an unclear answer, the job of this script is looked for.

    Args:
        script: the script.
        after: id of a job; this one begins not before that has begun, or was cancelled.

    Raises:
        UsageError: Slurm is not available or refuses the job.
        UnclearError: the job may have been queued.
    """
    options = [] if after is None else [f"--dependency=after:{after}"]
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        answer = _call(command, environment=_own_environment(), seconds=SUBMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _find_submitted(script, f"sbatch gave no answer in {SUBMIT_SECONDS:g} s")
    except KeyboardInterrupt:
        return _find_submitted(script, "interrupted while sbatch was answering")
    if answer.returncode == 0 and (job_id := _job_id(answer.stdout)):
        return job_id
    # A refusal is a status above 0 with a reason; anything else may have queued the job.
    if answer.returncode <= 0 or _UNCLEAR.search(answer.stderr):
        return _find_submitted(script, f"sbatch said: {_said(answer)}")
    raise UsageError(f"sbatch refuses the job: {_said(answer)}")


def _job_id(output: str) -> str:
    """Return the job id that sbatch printed, after a site's own notices; "" if there is none."""
    lines = [line.strip().partition(";")[0] for line in output.splitlines()]  # the format is job;cluster
    return next((line for line in reversed(lines) if line.isdecimal()), "")


def _find_submitted(script: Path, why: str) -> str:
    for pause in UNCLEAR_PAUSES:
        time.sleep(pause)
        with contextlib.suppress(UsageError):
            for job in queue():
                if job.script == script:
                    return job.job_id
    raise UnclearError(
        f"{why}; whether the job is queued is not known, so {script.parent} is kept: look with `squeue --me`, and "
        "when no job comes, `biroute resume` submits it again"
    )


def test_script(text: str) -> str:
    """Ask Slurm whether and when it could run the script `text`. Nothing is queued.

    Returns:
        Its answer; "" if it gives no clear one.

    Raises:
        UsageError: Slurm is not available or could not run the job.
    """
    try:
        answer = _call(["sbatch", "--test-only"], text, _own_environment(tell=False), LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    if answer.returncode == 0:
        return _said(answer)
    if _UNCLEAR.search(answer.stderr):
        return ""
    raise UsageError(f"Slurm could not run the job: {_said(answer)}")


def largest_partition(partitions: str | None) -> tuple[str, int] | None:
    """Find the largest of several partitions.

    Args:
        partitions: comma-separated names; None for the default partition.

    Returns:
        Its name and its number of nodes, including nodes that are down; None if Slurm knows none of the partitions or
        does not answer, since sbatch then reports a better error.
    """
    command = ["sinfo", "--noheader", "--format", "%P %D", *(["--partition", partitions] if partitions else [])]
    answer = _call(command)
    sizes: dict[str, int] = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        name, _, nodes = line.rpartition(" ")
        if (partitions or name.endswith("*")) and nodes.isdigit():
            sizes[name.rstrip("*")] = sizes.get(name.rstrip("*"), 0) + int(nodes)
    return max(sizes.items(), key=lambda size: size[1], default=None)


def queue(job_ids: Sequence[str] = (), seconds: float | None = None) -> list[Job]:
    """Return all jobs of this user that are queued or running; or with `job_ids` those of them, whoever's they are.

    Raises:
        UsageError: Slurm is not available, or does not answer within `seconds`.
    """
    fields = ["%i", "%T", "%L", "%r", "%N", "%V", "%S", "%k", "%o"]
    which = [f"--jobs={','.join(job_ids)}"] if job_ids else ["--me"]
    command = ["squeue", "--noheader", *which, "--format", _SEPARATOR.join(fields)]
    try:
        answer = _call(command, seconds=seconds)
    except subprocess.TimeoutExpired:
        raise UsageError(f"squeue gave no answer in {seconds:g} s") from None
    if job_ids and "Invalid job id" in answer.stderr:  # Slurm has forgotten all of them
        return []
    if answer.returncode != 0:
        raise UsageError(f"squeue fails: {_said(answer)}")
    jobs = []
    for row in _rows(answer.stdout, 9):
        job_id, state, time_left, reason, nodes, submitted, begins, comment, script = row
        begins = begins if begins[:1].isdigit() else ""  # N/A
        jobs.append(
            Job(job_id, state, _script(script), time_left, reason, nodes, "", submitted, begins, _note(comment))
        )
    return jobs


def find_job(job_id: str) -> Job | None:
    """Look a job up in the controller, then in the accounting database if there is one; None if neither knows it."""
    answer = _call(["scontrol", "show", "job", "-o", job_id])
    if answer.returncode == 0 and (state := _field(answer.stdout, "JobState")):
        command = re.search(r" Command=(.*?) WorkDir=", answer.stdout)
        comment = re.search(r" Comment=(.*?) StdErr=", answer.stdout)
        return Job(
            job_id,
            state,
            _script(command.group(1)) if command else None,
            reason=_field(answer.stdout, "Reason"),
            nodes=_field(answer.stdout, "NodeList").replace("(null)", ""),
            exit_code=_field(answer.stdout, "ExitCode"),
            note=_note(comment.group(1)) if comment else "",
        )
    return next(iter(past_jobs([job_id])), None)


def refuses_to_queue_again(job_id: str) -> bool:
    """Return whether Slurm holds that a job may not be queued again, whatever its script asked for.

    A site's plug-in decides that for each job; JobRequeue of `scontrol show config` is only for scripts that do not
    ask. False if Slurm does not say.
    """
    try:
        answer = _call(["scontrol", "show", "job", "-o", job_id], seconds=LOOK_SECONDS)
    except (UsageError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and _field(answer.stdout, "Requeue") == "0"


def _note(comment: str) -> str:
    return comment.removeprefix(_NOTE) if comment.startswith(_NOTE) else ""


def _rows(output: str, columns: int) -> list[list[str]]:
    """Split a table of Slurm's into its fields; other lines, such as a site's notices, are passed over."""
    rows = [line.split(_SEPARATOR, columns - 1) for line in output.splitlines()]
    return [row for row in rows if len(row) == columns and row[0].strip()]


def _field(shown: str, name: str) -> str:
    """Return a field of what `scontrol show job` says; "" if it is not there."""
    found = re.search(rf"\b{name}=(\S+)", shown)
    return found.group(1) if found else ""


def past_jobs(job_ids: Sequence[str]) -> list[Job]:
    """Return what the accounting database knows about the jobs; empty on a cluster without such a database."""
    if not job_ids:
        return []
    fields = "JobIDRaw,State,ExitCode,NodeList,SubmitLine"
    command = ["sacct", "-X", "-n", "-P", "--delimiter", _SEPARATOR, "-j", ",".join(job_ids), "-o", fields]
    try:
        answer = _call(command, seconds=LOOK_SECONDS)
    except (UsageError, subprocess.TimeoutExpired):
        return []
    jobs = []
    for row in _rows(answer.stdout, 5) if answer.returncode == 0 else []:
        job_id, state, exit_code, nodes, submit_line = row
        state = state.partition(" ")[0]  # such as "CANCELLED by 0"
        nodes = "" if nodes == "None assigned" else nodes
        jobs.append(Job(job_id, state, _script(submit_line), nodes=nodes, exit_code=exit_code))
    return jobs


def seconds_of(time_limit: str) -> int | None:
    """Convert a time limit in sbatch's format to seconds; None if it is unlimited."""
    if not time_limit[0].isdigit() or not time_limit.strip("0:-"):  # 0 is Slurm's word for no limit
        return None
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes[:seconds]
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def cancel(job_id: str) -> None:
    """End a job immediately. A failure is tried again.

    Raises:
        UsageError: Slurm refuses.
    """
    _check(["scancel", job_id])


def ask_to_stop(job_id: str) -> None:
    """Send USR1 to the batch script of a running job, which makes the job save and end. A failure is tried again.

    Raises:
        UsageError: Slurm refuses.
    """
    _check(["scancel", "--batch", "--signal=USR1", job_id])


def _check(command: list[str]) -> None:
    for pause in CANCEL_PAUSES:
        answer = _call(command)
        if answer.returncode == 0:
            return
        time.sleep(pause)
    raise UsageError(f"{command[0]} fails: {_said(answer)}")


def _own_environment(*, tell: bool = True) -> dict[str, str]:
    """Return this shell's variables without those by which sbatch and srun would override what the script says.

    SBATCH_PARTITION would, for example, SLURM_TIMELIMIT ends each step of the job, PYTHONPATH is of another program.
    With `tell`, those that a user may miss are named.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    ours = ("SBATCH_", "SLURM_", "SALLOC_", "SRUN_")
    dropped = [name for name in os.environ if name == "PYTHONPATH" or (name.startswith(ours) and name not in kept)]
    if tell and (told := [name for name in dropped if not name.startswith("SLURM_")]):
        print(f"warning: not passed on to the job: {', '.join(sorted(told))}; the profile decides", file=sys.stderr)
    return {name: value for name, value in os.environ.items() if name not in dropped}


def _call(
    command: Sequence[str],
    text: str | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a client command.

    Raises:
        UsageError: the command or the cluster is missing, or does not answer.
        subprocess.TimeoutExpired: it does not answer in the given `seconds`.
    """
    configured = os.environ.get("SLURM_CONF")
    if configured and not Path(configured).is_file():  # Slurm's commands would retry for a minute
        raise UsageError(f"SLURM_CONF={configured}: no such file, so there is no Slurm cluster; unset or correct it")
    try:
        answer = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds or TIMEOUT_SECONDS,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        raise UsageError(
            f"{command[0]}: no such command; run this on a login node of a Slurm cluster, or use `biroute train`"
        ) from None
    except subprocess.TimeoutExpired:
        if seconds is not None:
            raise
        raise NoAnswerError(
            f"{command[0]} gave no answer in {TIMEOUT_SECONDS:g} s; is the Slurm controller up? (scontrol ping)"
        ) from None
    for sign, meaning in (
        ("Could not establish a configuration source", "no Slurm cluster is configured here"),
        ("Unable to contact slurm controller", "the Slurm controller does not answer"),
        ("Connection refused", "the Slurm controller does not answer"),
    ):
        if answer.returncode != 0 and sign in answer.stderr:
            raise NoAnswerError(f"{command[0]}: {meaning}; check SLURM_CONF and `scontrol ping`")
    return answer


def _script(command: str) -> Path | None:
    """Extract the batch script from a command: squeue reports its path, sacct the whole sbatch line."""
    words = re.sub(r"^sbatch --parsable (--dependency=\S+ )?", "", command).strip()
    return Path(words) if words.startswith("/") else None


def _said(answer: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said, all of its lines as one."""
    lines = [line.strip() for line in (answer.stderr or answer.stdout).splitlines() if line.strip()]
    return "; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in lines) or f"exit status {answer.returncode}"
