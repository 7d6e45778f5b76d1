"""The begin and the end of an attempt, called by the batch script, which reads the answer from standard output.

    python -m biroute.slurm.job begin RUN_DIR                    prints the attempt's number
    python -m biroute.slurm.job end RUN_DIR ATTEMPT STATUS       prints requeue, stop or finished
    python -m biroute.slurm.job excluded RUN_DIR                 prints the bad nodes, comma-separated

`end` takes `--signal NAME` if the batch shell received a signal. Job, nodes and ranks come from Slurm's environment
variables. Messages for people go to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from biroute.configs.errors import EXIT_OK, EXIT_USAGE_ERROR, UsageError
from biroute.configs.load import load_config
from biroute.configs.records import last_lines
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.failures import explain_end, format_first_failure
from biroute.launcher.attempts.journal import FencingToken, Limits, begin_attempt, end_attempt, excluded_nodes
from biroute.launcher.attempts.run_files import CONFIG, LOGS, SUBMISSION, log_dir
from biroute.launcher.ranks.environment import expand_nodes
from biroute.launcher.track.tracker import close_after_crash

_LINES = 1000  # of the job's output, which ranks do not write to


def begin(run_dir: Path) -> int:
    """Take over the run folder for this job and return the number of the attempt.

    Raises:
        UsageError: another run was moved into the place of the folder.
    """
    env = os.environ
    submitted_as = _submitted_as(run_dir)
    if submitted_as != run_dir.resolve():
        raise UsageError(
            f"{run_dir} holds a run that was submitted as {submitted_as}, and this job is of another one; move both "
            "back to their places"
        )
    return begin_attempt(
        run_dir,
        nodes=expand_nodes(env.get("SLURM_JOB_NODELIST", "")),
        world_size=int(env.get("SLURM_NTASKS", "0")),
        job=env.get("SLURM_JOB_ID"),
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
    )


def _submitted_as(run_dir: Path) -> Path:
    """Return the run folder of the submission that is there; the ranks and `end` tell if it cannot be read."""
    try:
        return load_config(run_dir / SUBMISSION / CONFIG).train.run_dir.resolve()
    except UsageError:
        return run_dir.resolve()


def end(run_dir: Path, attempt: int, status: int, signal_name: str) -> str:
    """Record the end of an attempt and print its cause.

    Args:
        run_dir: the run folder.
        attempt: number of the attempt.
        status: exit status of srun.
        signal_name: signal that the batch shell received; empty if none.

    Returns:
        What the batch script has to do: requeue, stop or finished.
    """
    config = job_config(run_dir)
    logs = log_dir(run_dir, attempt)
    nodes = expand_nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    found = explain_end(logs, status, signal_name, nodes, said_during(run_dir, attempt))
    slurm = config.slurm
    limits = Limits(
        slurm.max_restarts, slurm.max_crashes_at_same_step, slurm.requeue, slurm.max_restarts_without_progress
    )
    decision, reason = end_attempt(run_dir, attempt, found, limits)
    if found.crash and (told := format_first_failure(logs)):
        print(told, file=sys.stderr)
    print(f"attempt {attempt}: {decision}: {reason}", file=sys.stderr)
    if decision == "stop" and found.crash:
        close_after_crash(FencingToken(run_dir, attempt))
    return decision or "stop"


def said_during(run_dir: Path, attempt: int) -> list[str]:
    """Return the lines that Slurm and the batch script wrote into the job's output during an attempt."""
    try:
        lines = last_lines(run_dir / LOGS / f"slurm-{os.environ.get('SLURM_JOB_ID', '')}.out", _LINES)
    except OSError:
        return []
    begun = max((n for n, line in enumerate(lines) if f"] attempt {attempt} on " in line), default=0)
    return lines[begun:]


def job_config(run_dir: Path) -> RunConfig:
    """Load the configuration that the job trains with."""
    frozen = run_dir / SUBMISSION / CONFIG
    return load_config(frozen if frozen.exists() else run_dir / CONFIG)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attempt_job", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", choices=("begin", "end", "excluded"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("attempt", type=int, nargs="?")
    parser.add_argument("status", type=int, nargs="?")
    parser.add_argument("--signal", default="", metavar="NAME")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "begin":
            print(begin(given.run_dir))
        elif given.verb == "excluded":
            print(",".join(excluded_nodes(given.run_dir, os.environ.get("SLURM_JOB_ID"))))
        elif given.attempt is None or given.status is None:
            parser.error("end needs ATTEMPT and STATUS")
        else:
            print(end(given.run_dir, given.attempt, given.status, given.signal))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE_ERROR
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
