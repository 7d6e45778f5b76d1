"""`biroute generate`: continue texts with a trained model. The work is done in biroute.launcher.generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_INTERRUPTED
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson
from biroute.launcher.generate.prompts import read_prompts
from biroute.launcher.generate.settings import Settings

generate_app = typer.Typer(no_args_is_help=True)


@generate_app.command("generate")
def generate_texts(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="the run, by its folder or configuration")],
    prompt: Annotated[str | None, typer.Option(help="the text to continue")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='file of prompts: one a line, or lines {"prompt": "..."} in a .jsonl file')
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="step of the checkpoint; left out: the newest valid")] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens after a prompt")] = 128,
    temperature: Annotated[float, typer.Option(help="divides the logits; 0: always the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw only from so many likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw only from the likeliest tokens with this probability")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="draw only tokens with this fraction of the likeliest one's probability")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="weakens tokens that occurred before; 1: none")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="text to end at, which is left out; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the draws: the same seed, the same text")] = 0,
    samples: Annotated[int, typer.Option(help="texts for each prompt")] = 1,
    batch_size: Annotated[int, typer.Option(help="texts that are generated at the same time; changes none")] = 8,
    document_start: Annotated[
        bool, typer.Option("--document-start", help="take each prompt as the beginning of a document")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="keep only the end of a prompt that is too long, and say so")
    ] = False,
    show_prompt: Annotated[bool, typer.Option("--echo", help="print each prompt before its text")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    fast: Annotated[
        bool, typer.Option("--fast", help="on a CPU: all sums in fp32; where a prompt ends may then change a text")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="file of the tokenizer; left out: the run's, or its dataset's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts with a trained model, from a checkpoint of any layout, with the routes of training.

    Example: biroute generate runs/debug --prompt "The first line of" --max-tokens 40 --top-p 0.9
    """
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    texts = read_prompts(prompt, prompts)
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.generate.command import Request, generate

    request = Request(
        run, texts, step=checkpoint, device=device, precision=precision, tokenizer=tokenizer, samples=samples,
        batch_size=batch_size, document_start=document_start, truncate=truncate, fast=fast, echo=show_prompt,
        as_json=as_json,
    )  # fmt: skip
    try:
        answer = generate(request, settings, lambda line: echo(line, err=True))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if answer:
        echo(answer)
