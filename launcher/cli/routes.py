"""`biroute routes`: which regions a trained model reads. The work is done in biroute.launcher.routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, Checkpoint, Device, Precision, RunOrConfig, TokenizerFile
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.routes.text_file import read_text

routes_app = typer.Typer(no_args_is_help=True)
_DEFAULT_OUT = Path("routes.html")


@routes_app.command("routes")
def show(
    run: RunOrConfig,
    text: Annotated[Path, typer.Option(help="the text, a UTF-8 file")],
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None, typer.Option(help="the page to write; left out: routes.html, and none with --json")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="show so many tokens of the text; left out: as many as the model takes")
    ] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Show which regions each layer reads of a text: one HTML page, complete in itself, or JSON.

    Example: biroute routes runs/debug --text README.md --max-tokens 64
    """
    model = ModelChoice(run, checkpoint, device, precision, tokenizer)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens={max_tokens} is out of range; use at least 1")
    if out is None and not as_json:
        out = _DEFAULT_OUT
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out={out}: there is no folder {out.parent}; make it, or name another")
    content = read_text(text)
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.routes.command import Request, show_routes

    request = Request(model, content, str(text), max_tokens=max_tokens, out=out, as_json=as_json)
    answer = show_routes(request, lambda line: echo(line, err=True))
    if answer:
        echo(answer)
