"""`biroute report`: runs compared, from what MLflow has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.launcher.cli.echo import echo

report_app = typer.Typer()


@report_app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or MLflow run ids with --uri")],
    uri: Annotated[
        str | None, typer.Option("--uri", help="MLflow tracking URI; left out: that of each run folder")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for report.html, report.md and its pictures")] = Path(
        "report"
    ),
) -> None:
    """Compare runs, from what MLflow has of them, on one page.

    Example: biroute report runs/demo --out report

    Loss against tokens, time and operations; throughput; predicted against measured; bytes between ranks. The HTML
    page needs no other file. A study of `biroute scale` is named by the folders of its sizes.
    """
    from biroute.launcher.report.compare import METRICS
    from biroute.launcher.report.page import write_report
    from biroute.launcher.track.mlflow_history import read_histories

    for path in write_report(read_histories(runs, uri, METRICS), out):
        echo(f"wrote {path}")
