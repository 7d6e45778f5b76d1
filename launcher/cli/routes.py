"""`biroute routes`: which regions a trained model reads. The work is done in biroute.launcher.routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_INTERRUPTED, UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson
from biroute.launcher.routes.text_file import read_text

routes_app = typer.Typer(no_args_is_help=True)
_DEFAULT_OUT = Path("routes.html")


@routes_app.command("routes")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="the run, by its folder or configuration")],
    text: Annotated[Path, typer.Option(help="the text, a UTF-8 file")],
    checkpoint: Annotated[int | None, typer.Option(help="step of the checkpoint; left out: the newest valid")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the page to write; left out: routes.html, and none with --json")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="show so many tokens of the text; left out: as many as the model takes")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="file of the tokenizer; left out: the run's, or its dataset's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which regions each layer reads of a text: one HTML page, complete in itself, or JSON.

    Example: biroute routes runs/debug --text README.md --max-tokens 64
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens={max_tokens} is out of range; use at least 1")
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision={precision} is unknown; use fp32 or bf16")
    if out is None and not as_json:
        out = _DEFAULT_OUT
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out={out}: there is no folder {out.parent}; make it, or name another")
    content = read_text(text)
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.routes.command import Request, show_routes

    request = Request(
        run, content, str(text), step=checkpoint, device=device, precision=precision, tokenizer=tokenizer,
        max_tokens=max_tokens, out=out, as_json=as_json,
    )  # fmt: skip
    try:
        answer = show_routes(request, lambda line: echo(line, err=True))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if answer:
        echo(answer)
