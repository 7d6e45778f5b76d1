"""`biroute evaluate`: measure a trained model. The work is done in biroute.launcher.evaluate."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from biroute.configs.errors import EXIT_INTERRUPTED, EXIT_USAGE_ERROR, UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, Checkpoint, Device, Precision, RunOrConfig, TokenizerFile
from biroute.launcher.generate.model_choice import ModelChoice

evaluate_app = typer.Typer(no_args_is_help=True)


@evaluate_app.command("evaluate")
def evaluate_run(
    run: RunOrConfig,
    text: Annotated[
        list[str] | None,
        typer.Option(help="text file, or pattern such as 'a/*.txt', instead of the held-out split; repeatable"),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="what to measure, with commas between: loss, needle, recall, cloze, or all")
    ] = "loss",
    checkpoint: Checkpoint = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="each valid checkpoint that has no result yet")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="with --every-checkpoint: wait for new ones until the run ends")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="sequences or documents to score, questions of each group of a task; left out: as many "
            "sequences as training, all documents, 50 questions"
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="tokens of the local window (W); left out: two regions")] = None,
    window_tokens: Annotated[
        int, typer.Option(help="tokens of each sequence that are scored with the last W tokens alone as well")
    ] = 64,
    stride: Annotated[
        int | None, typer.Option(help="of windows over documents longer than the model; left out: half its length")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the tasks: the same seed and text, the same questions")] = 0,
    name: Annotated[str | None, typer.Option(help="of the results; left out: heldout, or the text's name")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only say what each task needs and whether it can run")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder for a Markdown report and the numbers as JSON")] = None,
    no_tracking: Annotated[
        bool, typer.Option("--no-tracking", help="write nothing to the run folder, send nothing to MLflow")
    ] = False,
    device: Device = "auto",
    precision: Precision = "fp32",
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model: losses on held-out or given text and tasks made of it, into the run's MLflow run.

    Example: biroute evaluate runs/debug --tasks loss,recall --limit 8
    """
    from biroute.launcher.evaluate.tasks.names import task_names

    names = task_names(tasks)
    if every_checkpoint and checkpoint is not None:
        raise UsageError(f"--checkpoint={checkpoint} and --every-checkpoint exclude each other; use one of them")
    if follow and not every_checkpoint:
        raise UsageError("--follow is for --every-checkpoint; give both")
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    ignore_library_warnings()
    from biroute.launcher.evaluate import command

    request = command.Request(
        ModelChoice(run, checkpoint, device, precision, tokenizer), text or [], names, limit=limit, window=window,
        window_tokens=window_tokens, stride=stride, seed=seed, name=name, tracking=not no_tracking,
    )  # fmt: skip
    try:
        if check:
            lines, possible = command.check(request, _say)
            echo(lines)
            raise typer.Exit(0 if possible else EXIT_USAGE_ERROR)
        _run(request, every_checkpoint, follow, out, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _run(request: object, every: bool, follow: bool, out: Path | None, as_json: bool) -> None:
    """Evaluate, and show each result when it is there; the report is written anew after each."""
    from biroute.launcher.evaluate.command import Request, as_dicts, evaluate
    from biroute.launcher.evaluate.follow import evaluate_all
    from biroute.launcher.evaluate.report import make_folder, write_report
    from biroute.launcher.evaluate.results import table

    assert isinstance(request, Request)
    if out is not None:
        make_folder(out)
    found = []
    for one in evaluate_all(request, follow=follow, say=_say) if every else iter([evaluate(request, _say)]):
        found.append(one)
        if not as_json:
            echo(table(one) if len(found) == 1 else "\n" + table(one))
        if out is not None:
            words = shlex.join(["biroute", *sys.argv[1:]])
            path = write_report(out, found, words)
            _say(f"report: {path}")
    if as_json:
        echo(json.dumps(as_dicts(found), ensure_ascii=False))


def _say(line: str) -> None:
    echo(line, err=True)
