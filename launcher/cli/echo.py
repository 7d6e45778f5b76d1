"""What the commands print: nothing in it may command the terminal, wherever it comes from."""

from __future__ import annotations

import typer

from biroute.configs.messages import printable


def echo(text: str, *, err: bool = False) -> None:
    """Print a text, its control characters spelled; `err`: to the standard error stream."""
    typer.echo(printable(text), err=err)
