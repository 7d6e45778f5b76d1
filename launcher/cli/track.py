"""`biroute track ...`: what MLflow has of a run. The work is done in biroute.launcher.track.sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_OK, EXIT_USAGE_ERROR, UsageError
from biroute.launcher.attempts.run_files import METRICS_LOG
from biroute.launcher.cli.echo import echo

_RUNS = Path("runs")
track_app = typer.Typer(no_args_is_help=True, help="Send to MLflow what it has not received of a run.")


@track_app.callback()
def _group() -> None:
    """Send to MLflow what it has not received of a run."""


@track_app.command()
def sync(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN_DIR...", help="folders of runs")] = None,
    every: Annotated[bool, typer.Option("--all", help="all runs in ./runs")] = False,
) -> None:
    """Send what MLflow lacks of runs that have ended: points, files, description and end.

    Example: biroute track sync runs/demo

    Repeat it as often as you like: nothing comes twice. A run that is training sends its points itself.
    """
    from biroute.launcher.track.sync import sync_run

    found = [*(runs or []), *(sorted(path.parent for path in _RUNS.glob(f"*/{METRICS_LOG}")) if every else [])]
    if not found:
        raise UsageError(f"no run named, and none in {_RUNS}" if every else "name run folders, or use --all")
    failed = False
    for run in found:
        try:
            sent = sync_run(run, echo)
            echo(f"{run}: {sent.values} values and {sent.files} files sent: {sent.page}")
        except UsageError as error:  # one run that cannot be sent must not keep back the others
            echo(f"error: {error}", err=True)
            failed = True
    raise typer.Exit(EXIT_USAGE_ERROR if failed else EXIT_OK)
