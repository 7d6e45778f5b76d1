"""`biroute submit`, `status`, `logs`, `cancel`, `resume`: a run on a Slurm cluster, from a login node. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from biroute.launcher.submit import Submission

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="values to use instead of the file's")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print all that would be written; write and submit nothing")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="ask Slurm whether and when it could run the job; submit nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm; it goes on by itself through time limits, preemption and lost nodes to its last step.

    Example: biroute submit my.yaml slurm.profile=cluster.yaml slurm.nodes=4

    The configuration and the code are frozen into the run folder, train.run_dir; what holds for the whole cluster is
    in the profile.
    """
    from biroute.launcher import slurm
    from biroute.launcher.submit import check_run_dir, prepare, submit_run

    submission = prepare(config, overrides or [], Path.cwd())
    request = submission.request
    answer: dict[str, Any] = {
        "run_id": request.job_name,
        "run_dir": str(request.run_dir),
        "nodes": request.nodes,
        "ranks_per_node": request.ranks_per_node,
        "layout": str(submission.layout),
    }
    if dry_run:
        _print_dry_run(submission, answer, as_json)
        return
    check_run_dir(request.run_dir)
    if test:
        verdict = slurm.test_script(submission.script)
        typer.echo(json.dumps(answer | {"verdict": verdict}) if as_json else verdict)
        return
    answer["job_id"] = submit_run(submission)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(
        f"job {answer['job_id']}, run {request.job_name}: {request.nodes} nodes x {request.ranks_per_node} ranks, "
        f"{submission.layout}\n"
        f"run folder {request.run_dir}\n"
        f"follow it with: biroute logs --follow {request.run_dir}"
    )


def _print_dry_run(submission: Submission, answer: dict[str, Any], as_json: bool) -> None:
    from biroute.configs.load import dump_config
    from biroute.launcher.cluster_profile import dump_profile

    folder = submission.request.script.parent
    files = {
        "job.sbatch": submission.script,
        "config.yaml": dump_config(submission.config),
        "profile.yaml": dump_profile(submission.profile),
    }
    if as_json:
        typer.echo(json.dumps(answer | {"files": files}))
        return
    for name, text in files.items():
        typer.echo(f"==> {folder / name} <==\n{text}")
    typer.echo(f"nothing written, nothing submitted: run {answer['run_id']}, {answer['layout']}")


COMMANDS = (submit,)
