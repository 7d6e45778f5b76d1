"""`biroute chat`: talk with a trained model. The work is done in biroute.launcher.chat."""

from __future__ import annotations

from typing import Annotated

import typer

from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import (
    Checkpoint,
    Device,
    Fast,
    MinP,
    Precision,
    RepetitionPenalty,
    RunOrConfig,
    Temperature,
    TokenizerFile,
    TopK,
    TopP,
)
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.settings import Settings

chat_app = typer.Typer(no_args_is_help=True)


@chat_app.command("chat")
def talk(
    run: RunOrConfig,
    system: Annotated[str | None, typer.Option(help="what stands before the conversation")] = None,
    checkpoint: Checkpoint = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = Settings.max_tokens,
    temperature: Temperature = Settings.temperature,
    top_k: TopK = Settings.top_k,
    top_p: TopP = Settings.top_p,
    min_p: MinP = Settings.min_p,
    repetition_penalty: RepetitionPenalty = Settings.repetition_penalty,
    seed: Annotated[
        int, typer.Option(help="of the first answer's draws; each further one has the next")
    ] = Settings.seed,
    device: Device = "auto",
    precision: Precision = "fp32",
    fast: Fast = False,
    tokenizer: TokenizerFile = None,
) -> None:
    """Talk with a trained model, line by line; /help lists what else can be typed.

    Example: biroute chat runs/debug --max-tokens 40 --temperature 0.8
    """
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    model = ModelChoice(run, checkpoint, device, precision, tokenizer, fast)
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.chat.command import Request, chat

    chat(Request(model, system), settings, lambda line: echo(line, err=True))
