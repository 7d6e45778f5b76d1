"""`biroute doctor`: what a machine, or the ranks of a step, can do, and what is wrong with them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_OK, EXIT_USAGE_ERROR
from biroute.launcher.cli.options import AsJson

doctor_app = typer.Typer()


@doctor_app.command("doctor")
def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="the folder of runs, to be seen by every node")] = Path(
        "runs"
    ),
    gpu: Annotated[bool, typer.Option("--gpu", help="a machine without a working GPU is a problem")] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or the ranks that srun or torchrun started: run it first on a new cluster.

    Example: biroute doctor --run-dir runs

    It looks at versions, GPUs, driver, compiler, network and the run folder, compares routed attention with the
    reference, and measures the device; several ranks also do an all-reduce. Exit status 2 if there is a problem.
    """
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.configs.schema import TrainConfig
    from biroute.launcher.doctor.check import Check, problems, table
    from biroute.launcher.doctor.device import device_checks
    from biroute.launcher.doctor.ranks import joint_checks, leave_together
    from biroute.launcher.doctor.software import software_checks
    from biroute.launcher.ranks.environment import find_rank_environment, started_by_launcher
    from biroute.launcher.ranks.rendezvous import Place, choose_device, join_processes

    joined: Place | None = None
    if started_by_launcher(os.environ):
        joined = join_processes(find_rank_environment(), TrainConfig(device="cuda" if gpu else "auto"))
    device = joined.device if joined else choose_device("auto", 0)
    checks: list[Check] = [*software_checks(run_dir), *device_checks(device, gpu)]
    if joined:
        checks += joint_checks(joined, checks)
        leave_together()
    if joined is None or joined.rank == 0:
        typer.echo(json.dumps([asdict(check) for check in checks]) if as_json else table(checks))
    raise typer.Exit(EXIT_USAGE_ERROR if problems(checks) else EXIT_OK)
