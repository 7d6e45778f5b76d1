"""The command line. It does not import torch, so that help and checks respond immediately."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_USAGE_ERROR, UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.lazy import LazyGroup
from biroute.launcher.cli.options import ConfigPath, Overrides

app = typer.Typer(
    name="biroute",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain long-context language models with bi-level routing attention.",
    epilog="Exit status: 0 success; 1 failure; 2 usage error, in one line; 75 stopped on a signal with the state "
    "saved: run the same command again; 130 Ctrl-C elsewhere.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"biroute {version('biroute')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Pretrain long-context language models with bi-level routing attention."""


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="ranks on this machine; left out: as many as the layout needs, or one per GPU"),
    ] = None,
) -> None:
    """Train, or resume a run that was stopped. It starts the local ranks automatically.

    Example: biroute train configs/debug.yaml parallel.tensor=2 train.steps=50

    Under torchrun or srun, it uses the ranks that they started instead.
    """
    from biroute.launcher.start.train import train_here

    raise typer.Exit(train_here(config, overrides or [], processes))


@app.command()
def ui(
    config: ConfigPath,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="TCP port to listen on")] = 5055,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
) -> None:
    """Show the runs of a configuration's MLflow store in the browser.

    Example: biroute ui configs/demo.yaml --port 5056
    """
    from biroute.configs.load import load_config
    from biroute.launcher.track.mlflow_ui import serve_ui
    from biroute.launcher.track.uri import tracking_uri

    loaded = load_config(config, overrides or [])
    serve_ui(tracking_uri(loaded, loaded.train.run_dir, create=False), port, host)


def main() -> None:
    """Run the command line; a usage error is reported in one line with exit status 2."""
    if sys.getfilesystemencoding() != "utf-8":
        # Under a locale such as Latin-1, Python would misread paths and overrides that are not ASCII.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-P", "-m", "biroute.launcher.cli.main", *sys.argv[1:]])
    try:
        app()
    except UsageError as error:
        echo(f"error: {error}", err=True)
        sys.exit(EXIT_USAGE_ERROR)


if __name__ == "__main__":
    main()
