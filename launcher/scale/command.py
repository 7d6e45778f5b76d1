"""`biroute scale`: does it get faster with more ranks, and what does the rest of the time go into?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import ConfigPath, Overrides

scale_app = typer.Typer()
MODES = ("weak", "strong")


@scale_app.command()
def scale(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="numbers of ranks, with commas")] = "1,2",
    mode: Annotated[
        str, typer.Option(help="weak: the batch grows with the data ranks; strong: it stays", metavar="weak|strong")
    ] = "weak",
    steps: Annotated[int, typer.Option(min=5, help="optimizer steps of each size")] = 20,
    hardware: Annotated[
        str | None, typer.Option(help="hardware profile to predict with, as of biroute plan; left out: no prediction")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="submit each size as a job (slurm.profile); again, to collect the results")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for the report; left out: the folder of the study")
    ] = None,
) -> None:
    """Train the same run with several numbers of ranks, and compare speed, memory and bytes.

    Example: biroute scale configs/debug.yaml --ranks 1,2 --mode weak --steps 10

    The sizes differ in their data ranks; the batch of the configuration is that of the smallest. Each is a run in a
    folder of its own, below RUN_DIR-MODE-scaling, and a child of one run in MLflow. The same command continues a
    study that was interrupted, or adds sizes: what is finished is not run again.
    """
    from biroute.launcher.plan.hardware import load_hardware
    from biroute.launcher.ranks.environment import started_by_launcher
    from biroute.launcher.scale.run import run_study
    from biroute.launcher.scale.study import make_study

    if started_by_launcher():
        raise UsageError("biroute scale starts its ranks itself; call it once, not under torchrun or srun")
    if mode == "weak":
        study = make_study(config, overrides or [], _numbers(ranks), "weak", steps)
    elif mode == "strong":
        study = make_study(config, overrides or [], _numbers(ranks), "strong", steps)
    else:
        raise UsageError(f"--mode {mode}: use one of {', '.join(MODES)}")
    profile = load_hardware(hardware) if hardware is not None else None
    raise typer.Exit(run_study(study, profile, out, echo, on_slurm=slurm))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--ranks {text}: numbers of ranks with commas are wanted, such as 1,2,4") from None
