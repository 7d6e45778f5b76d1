"""`biroute serve`: a trained model over HTTP. The work is done in biroute.launcher.serve."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import Checkpoint, Device, Fast, MaxBatch, Precision, RunOrConfig, TokenizerFile
from biroute.launcher.generate.model_choice import ModelChoice

serve_app = typer.Typer(no_args_is_help=True)


@serve_app.command("serve")
def serve_model(
    run: RunOrConfig,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on; 0: any free one")] = 8000,
    max_batch: MaxBatch = 8,
    queue: Annotated[int, typer.Option(help="texts that may wait; more get the status 429")] = 64,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    fast: Fast = False,
    tokenizer: TokenizerFile = None,
) -> None:
    """Serve a trained model over HTTP, as OpenAI's completions and chat completions.

    Example: biroute serve runs/debug --port 8001 --max-batch 4
    """
    model = ModelChoice(run, checkpoint, device, precision, tokenizer, fast)
    if max_batch < 1:
        raise UsageError(f"--max-batch={max_batch} is out of range; use at least 1")
    if queue < 0:
        raise UsageError(f"--queue={queue} is out of range; use at least 0 (0: no text waits)")
    # All that can be said is said before the model is loaded, which takes seconds.
    _check_extra()
    from biroute.launcher.serve.listener import bind
    from biroute.launcher.start.library_warnings import ignore_library_warnings
    from biroute.launcher.track.mlflow_ui import check_port

    if port:
        check_port(host, port)
    else:
        bind(host, port).close()
    ignore_library_warnings()
    from biroute.launcher.serve.command import Request, serve

    request = Request(model, host=host, port=port, max_batch=max_batch, queue=queue)
    serve(request, lambda line: echo(line, err=True))


def _check_extra() -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"biroute serve needs {' and '.join(missing)}, not installed here; install it with "
            "`pip install 'biroute[serve]'`"
        )
