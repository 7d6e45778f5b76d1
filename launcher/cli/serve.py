"""`biroute serve`: a trained model over HTTP. The work is done in biroute.launcher.serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo

serve_app = typer.Typer(no_args_is_help=True)


@serve_app.command("serve")
def serve_model(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="the run, by its folder or configuration")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on")] = 8000,
    max_batch: Annotated[int, typer.Option(help="texts that are generated at the same time; changes none")] = 8,
    queue: Annotated[int, typer.Option(help="texts that may wait; more get the status 429")] = 64,
    checkpoint: Annotated[int | None, typer.Option(help="step of the checkpoint; left out: the newest valid")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    fast: Annotated[
        bool, typer.Option("--fast", help="on a CPU: all sums in fp32; where a prompt ends may then change a text")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="file of the tokenizer; left out: the run's, or its dataset's")
    ] = None,
) -> None:
    """Serve a trained model over HTTP, as OpenAI's completions and chat completions.

    Example: biroute serve runs/debug --port 8001 --max-batch 4
    """
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision={precision} is unknown; use fp32 or bf16")
    if max_batch < 1:
        raise UsageError(f"--max-batch={max_batch} is out of range; use at least 1")
    if queue < 0:
        raise UsageError(f"--queue={queue} is out of range; use at least 0 (0: no text waits)")
    from biroute.launcher.start.library_warnings import ignore_library_warnings
    from biroute.launcher.track.mlflow_ui import check_port

    check_port(host, port)  # before the model is loaded, which takes seconds
    ignore_library_warnings()
    from biroute.launcher.serve.command import Request, serve

    request = Request(
        run, step=checkpoint, device=device, precision=precision, tokenizer=tokenizer, fast=fast, host=host,
        port=port, max_batch=max_batch, queue=queue,
    )  # fmt: skip
    serve(request, lambda line: echo(line, err=True))
