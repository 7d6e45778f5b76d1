"""Commands to manage a run on a Slurm cluster from a login node: submit, status, logs, cancel, resume. No torch."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides

if TYPE_CHECKING:
    from biroute.slurm.client import Job
    from biroute.slurm.submit import Submission

RUN = "[RUN_DIR|CONFIG|JOB]"
Targets = Annotated[list[str] | None, typer.Argument(metavar=f"{RUN}...", help="runs, named in any of these ways")]
Target = Annotated[str, typer.Argument(metavar=RUN.strip("[]"), help="the run, named in any of these ways")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print everything that would be written; write and submit nothing")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="ask Slurm whether and when it could run the job; submit nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm; it resumes automatically until its last step.

    Example: biroute submit configs/demo.yaml slurm.profile=cpu

    The configuration and the code are copied into the run folder, train.run_dir. Settings of the whole cluster are in
    the profile.
    """
    from biroute.slurm import client
    from biroute.slurm.submit import check_request, limit_in_words, prepare, submit_run

    submission = prepare(config, overrides or [], Path.cwd())
    request = submission.request
    answer: dict[str, Any] = {
        "run_id": request.job_name,
        "run_dir": str(request.run_dir),
        "nodes": request.nodes,
        "ranks_per_node": request.ranks_per_node,
        "layout": str(submission.layout),
    }
    check_request(request)
    if dry_run:
        _print_dry_run(submission, answer, as_json)
        return
    if test:
        verdict = client.test_script(submission.script)
        echo(json.dumps(answer | {"verdict": verdict}) if as_json else verdict)
        return
    answer["job_id"] = submit_run(submission)
    if as_json:
        echo(json.dumps(answer))
        return
    partition, begins = request.profile.partition or "the default partition", client.expected_start(answer["job_id"])
    begins = f", expected to begin {begins}" if begins else ""
    echo(
        f"job {answer['job_id']}, run {request.job_name}: {request.nodes} nodes x {request.ranks_per_node} ranks, "
        f"{submission.layout}\n"
        f"in {partition}, {limit_in_words(request.time_limit)}{begins}\n"
        f"run folder {request.run_dir}\n"
        f"follow it with: biroute logs --follow {request.run_dir}"
    )


def _print_dry_run(submission: Submission, answer: dict[str, Any], as_json: bool) -> None:
    from biroute.configs.cluster_profile import dump_profile
    from biroute.configs.load import dump_config

    folder = submission.request.script.parent
    files = {
        "job.sbatch": submission.script,
        "config.yaml": dump_config(submission.config),
        "profile.yaml": dump_profile(submission.profile),
    }
    if as_json:
        echo(json.dumps(answer | {"files": files}))
        return
    for name, text in files.items():
        echo(f"==> {folder / name} <==\n{text}")
    echo(f"nothing written, nothing submitted: run {answer['run_id']}, {answer['layout']}")


def status(
    targets: Targets = None,
    as_json: AsJson = False,
    state: Annotated[
        str, typer.Option(metavar="STATE,...", help="only runs in these states, such as running,queued")
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again, until Ctrl-C")] = False,
    every: Annotated[float, typer.Option(min=2.0, help="seconds between two looks of --watch")] = 10.0,
) -> None:
    """Show runs: state, step, tokens per second, time left, jobs, and why each attempt ended.

    Example: biroute status runs/demo

    Named runs are shown in full. Without an argument there is a table, newest first, of all runs that have jobs and
    those in ./runs.
    """
    states = [word for word in state.split(",") if word]
    if not watch:
        _show_status(targets or [], as_json, states)
        return
    try:
        while True:
            if sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")  # clear the screen
            echo(f"{time.strftime('%F %T')}, again every {every:g} s")
            _show_status(targets or [], as_json, states)
            time.sleep(every)
    except KeyboardInterrupt:
        echo("")


def _show_status(targets: list[str], as_json: bool, states: list[str]) -> None:
    from biroute.slurm.run_folder import find_run, known_runs
    from biroute.slurm.status import among, survey
    from biroute.slurm.status_text import format_status, format_table

    among([], states)  # a state that there is not, said before Slurm is asked
    queue = _queue()
    runs = [find_run(target) for target in targets] if targets else known_runs(queue)
    found, unreadable = survey(runs, queue)
    found = among(found, states)
    if as_json:
        echo(json.dumps([one.as_json() for one in found]))
    elif targets:
        for one in found:
            echo(format_status(one))
    elif found:
        echo(format_table(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for line in unreadable:
        echo(line, err=True)
    if not runs:
        echo(
            "no runs: none of your jobs is one, and ./runs contains none; name a run folder, a configuration or a job"
        )
    elif not found and not unreadable:
        echo(f"none of {len(runs)} runs is {' or '.join(states)}")
    if queue is None and shutil.which("squeue") is not None:
        echo("Slurm does not answer, so jobs are not shown", err=True)


def logs(
    target: Target,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="keep printing new output across attempts until the run ends")
    ] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="number of the attempt; left out: the newest")] = None,
    rank: Annotated[int, typer.Option(min=0, help="rank whose log is shown")] = 0,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="number of past lines to show")] = 30,
) -> None:
    """Show what a run's ranks print; if an attempt failed, first the error of the rank that failed first.

    Example: biroute logs --follow runs/demo
    """
    from biroute.slurm.logs import follow_logs, format_logs
    from biroute.slurm.run_folder import find_run

    run = find_run(target)
    if not follow:
        echo(format_logs(run, attempt, rank, lines))
        return
    try:
        follow_logs(run, rank, lines, echo)
    except KeyboardInterrupt:
        echo("")


def cancel(
    target: Target,
    now: Annotated[bool, typer.Option("--now", help="end it immediately, without saving")] = False,
) -> None:
    """Cancel a run: its jobs save, end, and are not queued again.

    Example: biroute cancel runs/demo
    """
    from biroute.slurm.control import cancel_run
    from biroute.slurm.run_folder import find_run

    for line in cancel_run(find_run(target), now=now):
        echo(line)


def resume(target: Target) -> None:
    """Submit a cancelled, stopped or lost run again, from its newest checkpoint.

    Example: biroute resume runs/demo

    It submits RUN_DIR/submission/job.sbatch unchanged; to change limits, edit that script or config.yaml next to it.
    """
    from biroute.slurm.control import resume_run
    from biroute.slurm.run_folder import find_run

    run = find_run(target)
    echo(f"job {resume_run(run)}, run {run.name}")


def _queue() -> list[Job] | None:
    """Return this user's jobs; None if Slurm does not answer."""
    from biroute.slurm import client

    try:
        return client.queue(seconds=client.LOOK_SECONDS)
    except UsageError:
        return None


slurm_app = typer.Typer()
for command in (submit, status, logs, cancel, resume):
    slurm_app.command()(command)
