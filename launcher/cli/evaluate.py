"""`biroute evaluate`: measure a trained model. The work is done in biroute.launcher.evaluate."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biroute.configs.errors import EXIT_INTERRUPTED, EXIT_USAGE_ERROR, UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, Checkpoint, Device, Precision, RunOrConfig, TokenizerFile
from biroute.launcher.generate.model_choice import ModelChoice

if TYPE_CHECKING:
    from biroute.launcher.evaluate.command import Request
    from biroute.launcher.evaluate.ranks import EvaluationRanks

evaluate_app = typer.Typer(no_args_is_help=True)


Text = Annotated[
    list[str] | None,
    typer.Option(help="text file, or pattern such as 'a/*.txt', instead of the held-out split; repeatable"),
]
Tasks = Annotated[
    str,
    typer.Option(
        help="what to measure, with commas between: loss, needle, recall, tracking, cloze, choice, or all of "
        "these; lm_eval:NAME for a task of lm-eval"
    ),
]
EveryCheckpoint = Annotated[
    bool, typer.Option("--every-checkpoint", help="each valid checkpoint that has no result yet")
]
Follow = Annotated[
    bool, typer.Option("--follow", help="with --every-checkpoint: wait for new ones until the run ends")
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="sequences or documents to score, questions of each group of a task; left out: as many "
        "sequences as training, all documents, 50 questions"
    ),
]
Window = Annotated[int | None, typer.Option(help="tokens of the local window (W); left out: two regions")]
WindowTokens = Annotated[
    int, typer.Option(help="tokens of each sequence that are scored with the last W tokens alone as well")
]
Stride = Annotated[
    int | None, typer.Option(help="of windows over documents longer than the model; left out: half its length")
]
Seed = Annotated[int, typer.Option(help="of the tasks: the same seed and text, the same questions")]
Name = Annotated[str | None, typer.Option(help="of the results; left out: heldout, or the text's name")]
Include = Annotated[
    Path | None, typer.Option("--lm-eval-include", help="folder with YAML files of your own tasks for lm-eval")
]
Fewshot = Annotated[
    int | None, typer.Option(help="examples before each question of lm-eval's tasks; left out: as each task says")
]
Ranks = Annotated[
    int, typer.Option(min=1, help="processes on this machine that share the work; under srun: those it started")
]
Check = Annotated[bool, typer.Option("--check", help="only say what each task needs and whether it can run")]
Out = Annotated[Path | None, typer.Option(help="folder for a Markdown report and the numbers as JSON")]
NoTracking = Annotated[
    bool, typer.Option("--no-tracking", help="write nothing to the run folder, send nothing to MLflow")
]


@evaluate_app.command("evaluate")
def evaluate_run(
    run: RunOrConfig,
    text: Text = None,
    tasks: Tasks = "loss",
    checkpoint: Checkpoint = None,
    every_checkpoint: EveryCheckpoint = False,
    follow: Follow = False,
    limit: Limit = None,
    window: Window = None,
    window_tokens: WindowTokens = 64,
    stride: Stride = None,
    seed: Seed = 0,
    name: Name = None,
    include: Include = None,
    fewshot: Fewshot = None,
    ranks: Ranks = 1,
    check: Check = False,
    out: Out = None,
    no_tracking: NoTracking = False,
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
    from biroute.launcher.ranks.environment import RENDEZVOUS_FILE, started_by_launcher
    from biroute.launcher.ranks.stop_signal import end_on_signals
    from biroute.launcher.start.library_warnings import ignore_library_warnings

    joins = started_by_launcher() and not check
    if ranks > 1 and not joins and not check:
        raise typer.Exit(_on_local_ranks(ranks))
    if RENDEZVOUS_FILE in os.environ:  # a rank that _on_local_ranks started
        end_on_signals()
    ignore_library_warnings()
    from biroute.launcher.evaluate import command
    from biroute.launcher.evaluate.ranks import EvaluationRanks, join_ranks

    request = command.Request(
        ModelChoice(run, checkpoint, device, precision, tokenizer), text or [], names, limit=limit, window=window,
        window_tokens=window_tokens, stride=stride, seed=seed, name=name, tracking=not no_tracking,
        include=include, fewshot=fewshot,
    )  # fmt: skip
    try:
        if check:
            lines, possible = command.check(request, _say)
            echo(lines)
            raise typer.Exit(0 if possible else EXIT_USAGE_ERROR)
        place = join_ranks(request.model) if joins else EvaluationRanks()
        _run(request, place, every_checkpoint, follow, out, as_json)
    except KeyboardInterrupt:
        echo("stopped; results that were shown are kept", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _on_local_ranks(ranks: int) -> int:
    """Run the same command as each of so many ranks; returns their status."""
    import tempfile

    from biroute.launcher.start.local import run_local_ranks

    with tempfile.TemporaryDirectory(prefix="biroute-evaluate-") as logs:
        return run_local_ranks(sys.argv[1:], ranks, Path(logs), None, "biroute.launcher.cli.main")


def _run(
    request: Request, ranks: EvaluationRanks, every: bool, follow: bool, out: Path | None, as_json: bool
) -> None:
    """Evaluate, and show each result when it is there; the report is written anew after each. Rank 0 speaks."""
    from biroute.launcher.evaluate.command import as_dicts, evaluate
    from biroute.launcher.evaluate.follow import evaluate_all
    from biroute.launcher.evaluate.report import make_folder, write_report
    from biroute.launcher.evaluate.results import table

    first = ranks.rank == 0
    say = _say if first else lambda _: None
    if out is not None:
        ranks.all_or_none(lambda: make_folder(out) if first else None)
    found = []
    for one in (
        evaluate_all(request, follow=follow, say=say, ranks=ranks) if every else iter([evaluate(request, say, ranks)])
    ):
        found.append(one)
        if first and not as_json:
            echo(table(one) if len(found) == 1 else "\n" + table(one))
        if first and out is not None:
            words = shlex.join(["biroute", *sys.argv[1:]])
            say(f"report: {write_report(out, found, words)}")
    if first and as_json:
        echo(json.dumps(as_dicts(found), ensure_ascii=False))


def _say(line: str) -> None:
    echo(line, err=True)
