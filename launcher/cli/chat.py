"""`biroute chat`: talk with a trained model. The work is done in biroute.launcher.chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_INTERRUPTED, UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.generate.settings import Settings

chat_app = typer.Typer(no_args_is_help=True)


@chat_app.command("chat")
def talk(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="the run, by its folder or configuration")],
    system: Annotated[str | None, typer.Option(help="what stands before the conversation")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="step of the checkpoint; left out: the newest valid")] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 128,
    temperature: Annotated[float, typer.Option(help="divides the logits; 0: always the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw only from so many likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw only from the likeliest tokens with this probability")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="draw only tokens with this fraction of the likeliest one's probability")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="weakens tokens that occurred before; 1: none")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the first answer's draws; each further one has the next")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    fast: Annotated[
        bool, typer.Option("--fast", help="on a CPU: all sums in fp32; where a prompt ends may then change a text")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="file of the tokenizer; left out: the run's, or its dataset's")
    ] = None,
) -> None:
    """Talk with a trained model, line by line; /help lists what else can be typed.

    Example: biroute chat runs/debug --max-tokens 40 --temperature 0.8
    """
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision={precision} is unknown; use fp32 or bf16")
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.chat.command import Request, chat

    request = Request(
        run, step=checkpoint, device=device, precision=precision, tokenizer=tokenizer, fast=fast, system=system
    )
    try:
        chat(request, settings, lambda line: echo(line, err=True))
    except KeyboardInterrupt:  # while the model was being loaded
        raise typer.Exit(EXIT_INTERRUPTED) from None
