"""Commands to manage a run on a Slurm cluster from a login node: submit, status, logs, cancel, resume. No torch."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides

if TYPE_CHECKING:
    from biroute.slurm.client import Job
    from biroute.slurm.run_folder import RunFolder
    from biroute.slurm.submit import Submission

RUN = "[RUN_DIR|CONFIG|JOB]"
Targets = Annotated[list[str] | None, typer.Argument(metavar=f"{RUN}...", help="runs, named in any of these ways")]
Target = Annotated[str, typer.Argument(metavar=RUN.strip("[]"), help="the run, named in any of these ways")]


Partition = Annotated[str | None, typer.Option("--partition", help="partition; left out: the profile's")]
TimeLimit = Annotated[str | None, typer.Option("--time", help="time limit, as slurm.time_limit")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="number of nodes, as slurm.nodes")]


Evaluate = Annotated[
    bool,
    typer.Option("--evaluate", help="add a job of one node that evaluates each checkpoint beside the training"),
]
EvaluateOptions = Annotated[
    str | None, typer.Option(help="of its `biroute evaluate`, such as '--tasks loss,recall --limit 8'")
]
EvaluateTime = Annotated[
    str | None, typer.Option(help="its time limit; left out: the training's. It is queued again at the limit")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check everything and say what would be submitted; write nothing")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="with --dry-run: print all files that would be written")
]
Test = Annotated[bool, typer.Option("--test", help="ask Slurm whether and when it could run the job; submit nothing")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    partition: Partition = None,
    time_limit: TimeLimit = None,
    nodes: Nodes = None,
    evaluate: Evaluate = False,
    evaluate_options: EvaluateOptions = None,
    evaluate_time: EvaluateTime = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    test: Test = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm; it resumes automatically until its last step.

    Example: biroute submit configs/demo.yaml slurm.profile=cpu

    The configuration and the code are copied into the run folder, train.run_dir. Settings of the whole cluster are in
    the profile.
    """
    from biroute.slurm import client
    from biroute.slurm.submit import check_request, prepare, submit_run, with_evaluation

    arguments = _evaluate_arguments(evaluate, evaluate_options, evaluate_time)
    submission = prepare(config, _with_limits(overrides, time_limit, nodes), Path.cwd(), partition)
    if evaluate:
        submission = with_evaluation(submission, arguments, evaluate_time)
    request = submission.request
    answer: dict[str, Any] = {
        "run_id": request.job_name,
        "run_dir": str(request.run_dir),
        "nodes": request.nodes,
        "ranks_per_node": request.ranks_per_node,
        "layout": str(submission.layout),
    }
    if submission.forecast is not None:
        answer["predicted"] = submission.forecast.as_values()
    if dry_run:
        check_request(request)
        _print_dry_run(submission, answer, as_json, verbose)
        return
    if test:
        verdict = client.test_script(submission.script)
        verdict = verdict or "Slurm gave no clear answer; try again"
        echo(json.dumps(answer | {"verdict": verdict}) if as_json else verdict)
        return
    answer["job_id"] = submit_run(submission)
    if evaluate:
        answer["evaluation_job_id"] = _submit_evaluation(request.run_dir, answer["job_id"])
    if as_json:
        echo(json.dumps(answer))
        return
    echo(f"job {answer['job_id']}, {_in_words(submission)}")
    if answer.get("evaluation_job_id"):
        echo(f"job {answer['evaluation_job_id']} evaluates its checkpoints")
    _tell_of_job(answer["job_id"], requeue=submission.config.slurm.requeue)
    echo(f"follow it with: biroute logs --follow {request.run_dir}")


def _evaluate_arguments(wanted: bool, options: str | None, time_limit: str | None) -> tuple[str, ...]:
    """Check what a job that evaluates is given."""
    from biroute.slurm.evaluation import check_time_limit, parse_arguments

    for name, value in (("options", options), ("time", time_limit)):
        if value is not None and not wanted:
            raise UsageError(f"--evaluate-{name}={value} is for --evaluate; give both")
    check_time_limit(time_limit)
    return parse_arguments(options or "")


def _submit_evaluation(run_dir: Path, job_id: str) -> str | None:
    """Submit the job that evaluates; the training is submitted, whatever becomes of it."""
    from biroute.slurm.evaluation import submit_evaluation

    try:
        return submit_evaluation(run_dir, job_id)
    except (UsageError, OSError) as error:
        _warn_of_evaluation(run_dir, error)
        return None


def _warn_of_evaluation(run_dir: Path, error: Exception) -> None:
    echo(
        f"warning: no job evaluates this run ({error}); `biroute evaluate {run_dir} --every-checkpoint --follow` "
        "does it by hand",
        err=True,
    )


def _with_limits(overrides: list[str] | None, time_limit: str | None, nodes: int | None) -> list[str]:
    """Add what the options --time and --nodes stand for."""
    added = [f"slurm.time_limit={time_limit}"] if time_limit is not None else []
    return [*(overrides or []), *added, *([f"slurm.nodes={nodes}"] if nodes is not None else [])]


def _in_words(submission: Submission) -> str:
    from biroute.slurm.submit import limit_in_words

    request = submission.request
    partition = f"partition {request.profile.partition}" if request.profile.partition else "the default partition"
    lines = [
        f"run {request.job_name}: {request.nodes} nodes x {request.ranks_per_node} ranks, {submission.layout}",
        f"in {partition}, {limit_in_words(request.time_limit)}",
        *(submission.forecast.lines() if submission.forecast is not None else []),
        f"run folder {request.run_dir}",
    ]
    return "\n".join(lines)


def _tell_of_job(job_id: str, *, requeue: bool) -> None:
    """Say what Slurm makes of a job that was just submitted, as far as it says so."""
    from biroute.slurm import client

    if requeue and client.refuses_to_queue_again(job_id):
        echo("this site does not queue a job again (Requeue=0): at each stop BiRoute submits a new job instead")
    if waits := _why_it_waits(job_id):
        echo(waits)


def _why_it_waits(job_id: str) -> str:
    """Say why a job has not begun and when it may; "" if it has, or if Slurm does not say."""
    from biroute.slurm import client
    from biroute.slurm.status import run_state

    try:
        jobs = client.queue([job_id], seconds=client.LOOK_SECONDS)
    except UsageError:
        return ""
    state, reason = run_state(jobs, [], cancelled=False) if jobs else ("", "")
    return f"queued: {reason}" if state == "queued" and reason else ""


def _print_dry_run(submission: Submission, answer: dict[str, Any], as_json: bool, verbose: bool) -> None:
    from biroute.configs.cluster_profile import dump_profile
    from biroute.configs.load import dump_config
    from biroute.slurm.evaluation import render_evaluation

    folder = submission.request.script.parent
    files = {
        "job.sbatch": submission.script,
        "config.yaml": dump_config(submission.config),
        "profile.yaml": dump_profile(submission.profile),
    }
    if submission.evaluation is not None:
        files["evaluate.sbatch"] = render_evaluation(submission.evaluation)
    if as_json:
        echo(json.dumps(answer | {"files": files}))
        return
    if verbose:
        for name, text in files.items():
            echo(f"==> {folder / name} <==\n{text}")
    echo(_in_words(submission))
    echo(f"{submission.config.train.steps:,} steps of {submission.config.tokens_per_step:,} tokens")
    echo("sound: configuration, layout, dataset, newest checkpoint, tracking URI, run folder")
    echo("nothing written, nothing submitted" + ("" if verbose else "; --verbose shows script and configuration"))


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
    from biroute.slurm.run_folder import find_run, known_runs, told_gone
    from biroute.slurm.status import among, survey
    from biroute.slurm.status_text import format_status, format_table

    among([], states)  # a state that there is not, said before Slurm is asked
    queue = _queue()
    runs = [find_run(target) for target in targets] if targets else known_runs(queue)
    found, unreadable = survey(runs, queue)
    unreadable += [] if targets else told_gone(queue)
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
    if not runs and not unreadable:
        nothing = "no runs: none of your jobs is one, and ./runs contains none; name a run folder, a configuration"
        echo(f"{nothing} or a job", err=as_json)
    elif not found and not unreadable:
        echo(f"none of {len(runs)} runs is {' or '.join(states)}", err=as_json)
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
    preflight: Annotated[bool, typer.Option("--preflight", help="the check of the nodes instead of a rank")] = False,
    job: Annotated[bool, typer.Option("--job", help="what the batch script printed instead of a rank")] = False,
) -> None:
    """Show what a run's ranks print; if an attempt failed, first the error of the rank that failed first.

    Example: biroute logs --follow runs/demo
    """
    from biroute.slurm.logs import follow_logs, format_job_output, format_logs, format_preflight
    from biroute.slurm.run_folder import find_run

    if preflight + job + follow > 1:
        raise UsageError("--preflight, --job and --follow exclude each other; choose one")
    run = find_run(target)
    with _unreadable_is_one_line(run):
        if preflight or job:
            echo(format_preflight(run, attempt, lines) if preflight else format_job_output(run, lines))
            return
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

    run = find_run(target)
    with _unreadable_is_one_line(run):
        lines = cancel_run(run, now=now)
    for line in lines:
        echo(line)


def resume(
    target: Target,
    overrides: Overrides = None,
    partition: Partition = None,
    time_limit: TimeLimit = None,
    nodes: Nodes = None,
) -> None:
    """Submit a cancelled, stopped or lost run again, from its newest checkpoint.

    Example: biroute resume runs/demo

    With overrides or options, configuration and script are written anew and the earlier ones kept, in
    RUN_DIR/submission/earlier; the code stays what was submitted.
    """
    from biroute.slurm.control import resume_evaluation, resume_run
    from biroute.slurm.forecast import forecast_of_run
    from biroute.slurm.run_folder import find_run

    run = find_run(target)
    with _unreadable_is_one_line(run):
        job_id = resume_run(run, _with_limits(overrides, time_limit, nodes), partition)
    echo(f"job {job_id}, run {run.name}")
    try:
        if (evaluation := resume_evaluation(run, job_id)) is not None:
            echo(f"job {evaluation} evaluates its checkpoints")
    except (UsageError, OSError) as error:
        _warn_of_evaluation(run.path, error)
    try:
        if (forecast := forecast_of_run(run)) is not None:
            echo("\n".join(forecast.lines()))
    except UsageError as error:  # the job is submitted, whatever there is to say of it
        echo(f"nothing is predicted: {error}", err=True)
    config = run.config()
    _tell_of_job(job_id, requeue=config is not None and config.slurm.requeue)


@contextmanager
def _unreadable_is_one_line(run: RunFolder) -> Iterator[None]:
    """Name the file of a run folder that cannot be read or written, such as that of another user."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # not of a file: a closed pipe
            raise
        raise UsageError(f"run {run.name}: {error.filename}: {error.strerror}; correct it and try again") from None


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
