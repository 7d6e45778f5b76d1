"""The command line. It does not import torch, so that help and checks respond immediately."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from biroute.configs.errors import DISK_FULL, EXIT_STOPPED, EXIT_USAGE_ERROR, UsageError
from biroute.configs.process import open_standard_streams
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.lazy import LazyGroup
from biroute.launcher.cli.options import ConfigPath, Overrides

_AGAIN_SECONDS = 0.05
_SHOWN_CHARACTERS = 120

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

    try:
        raise typer.Exit(train_here(config, overrides or [], processes))
    except KeyboardInterrupt:  # before the ranks started; they handle it themselves
        echo("stopped by SIGINT before training began; nothing is lost: run the same command again", err=True)
        raise typer.Exit(EXIT_STOPPED) from None


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


def _interrupt_again(ignored: sys.UnraisableHookArgs) -> None:
    """Let no Ctrl-C be lost: one that arrives in a callback of a library, as imports have them, is ignored there."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        # Not from here, where it would be ignored as well.
        main_thread = threading.main_thread().ident
        with contextlib.suppress(RuntimeError):  # no thread starts any more: the command has ended
            threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, [main_thread, signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(ignored)


def main() -> None:
    """Run the command line; a usage error is reported in one line with exit status 2."""
    open_standard_streams()
    sys.unraisablehook = _interrupt_again
    if sys.getfilesystemencoding() != "utf-8":
        # Under a locale such as Latin-1, Python would misread paths and overrides that are not ASCII.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-P", "-m", "biroute.launcher.cli.entry", *sys.argv[1:]])
    try:
        app()
    except UsageError as error:
        echo(f"error: {error}", err=True)
        sys.exit(EXIT_USAGE_ERROR)
    except OSError as error:
        line = _explain(error)
        if line is None:
            raise
        if error.errno in DISK_FULL:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what could not be printed is tried once more at exit
        with contextlib.suppress(OSError):
            echo(f"error: {line}", err=True)
        sys.exit(EXIT_USAGE_ERROR)


def _explain(error: OSError) -> str | None:
    """Say in one line what a user can do, wherever in a command the error was met; None for an internal error."""
    if error.errno in DISK_FULL:
        where = error.filename or "what this command prints"
        return f"{where} cannot be written ({error.strerror}); free some space, and run the same command again"
    if error.errno == errno.ENAMETOOLONG:  # no name of ours is long
        return f"{_shortened(str(error.filename))}: {error.strerror}; use a shorter one"
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):  # of Python's module tempfile
        return "no folder for temporary files can be written; set TMPDIR to one that can be"
    return None


def _shortened(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."


if __name__ == "__main__":
    main()
