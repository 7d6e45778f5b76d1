"""`biroute generate`: continue texts with a trained model. The work is done in biroute.launcher.generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Fast,
    MaxBatch,
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
from biroute.launcher.generate.prompts import read_prompts
from biroute.launcher.generate.settings import Settings

generate_app = typer.Typer(no_args_is_help=True)


@generate_app.command("generate")
def generate_texts(
    run: RunOrConfig,
    prompt: Annotated[str | None, typer.Option(help="the text to continue")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='file of prompts: one a line, or lines {"prompt": "..."} in a .jsonl file')
    ] = None,
    checkpoint: Checkpoint = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens after a prompt")] = Settings.max_tokens,
    temperature: Temperature = Settings.temperature,
    top_k: TopK = Settings.top_k,
    top_p: TopP = Settings.top_p,
    min_p: MinP = Settings.min_p,
    repetition_penalty: RepetitionPenalty = Settings.repetition_penalty,
    stop: Annotated[list[str] | None, typer.Option(help="text to end at, which is left out; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the draws: the same seed, the same text")] = Settings.seed,
    samples: Annotated[int, typer.Option(help="texts for each prompt")] = 1,
    batch_size: MaxBatch = 8,
    document_start: Annotated[
        bool, typer.Option("--document-start", help="take each prompt as the beginning of a document")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="keep only the end of a prompt that is too long, and say so")
    ] = False,
    show_prompt: Annotated[bool, typer.Option("--echo", help="print each prompt before its text")] = False,
    device: Device = "auto",
    precision: Precision = "fp32",
    fast: Fast = False,
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts with a trained model, from a checkpoint of any layout, with the routes of training.

    Example: biroute generate runs/debug --prompt "The first line of" --max-tokens 40 --top-p 0.9
    """
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    model = ModelChoice(run, checkpoint, device, precision, tokenizer, fast)
    texts = read_prompts(prompt, prompts)
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.generate.command import Request, generate

    request = Request(
        model, texts, samples=samples, batch_size=batch_size, document_start=document_start, truncate=truncate,
        echo=show_prompt, as_json=as_json,
    )  # fmt: skip
    answer = generate(request, settings, lambda line: echo(line, err=True))
    if answer:
        echo(answer)
