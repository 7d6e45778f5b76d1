"""`biroute checkpoint ...`: what a run has saved. The work is done in biroute.parallel.checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import EXIT_OK, EXIT_USAGE_ERROR, UsageError
from biroute.configs.load import load_config
from biroute.launcher.attempts.run_files import CHECKPOINTS
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, RunOrConfig

if TYPE_CHECKING:
    from biroute.parallel.checkpoint.survey import Found

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify and copy the checkpoints of a run.")


@checkpoint_app.command("list")
def list_all(run: RunOrConfig, as_json: AsJson = False) -> None:
    """Show each checkpoint: step, time, size, layout, who wrote it, and whether all of its files are there.

    Example: biroute checkpoint list runs/debug
    """
    _show(run, deep=False, as_json=as_json)


@checkpoint_app.command()
def verify(run: RunOrConfig, as_json: AsJson = False) -> None:
    """As list, and compare every file with its checksum. Exit status 2 if a checkpoint is damaged.

    Example: biroute checkpoint verify runs/debug
    """
    damaged = _show(run, deep=True, as_json=as_json)
    raise typer.Exit(EXIT_USAGE_ERROR if damaged else EXIT_OK)


@checkpoint_app.command()
def copy(
    run: RunOrConfig,
    new_run_dir: Annotated[Path, typer.Argument(metavar="NEW_RUN_DIR", help="folder of the run that starts from it")],
    step: Annotated[int | None, typer.Option(min=0, help="step of the checkpoint; left out: the newest")] = None,
) -> None:
    """Copy a checkpoint into a new run folder, from where another run starts; the copy is verified.

    Example: biroute checkpoint copy runs/debug runs/longer
    """
    from biroute.parallel.checkpoint.survey import checkpoint_of, copy_checkpoint

    path = copy_checkpoint(checkpoint_of(_folder(run), step), new_run_dir / CHECKPOINTS)
    echo(f"{path}: copied and verified; train with train.run_dir={new_run_dir} to go on from it")


def _folder(run: Path) -> Path:
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_config(run).train.run_dir
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        raise UsageError(f"{run} has no folder {CHECKPOINTS}; name a run folder, or its configuration")
    return directory


def _show(run: Path, *, deep: bool, as_json: bool) -> bool:
    """Print what is there; returns whether a finished checkpoint is damaged."""
    from biroute.parallel.checkpoint.files import PARTIAL
    from biroute.parallel.checkpoint.survey import survey

    directory = _folder(run)
    found = survey(directory, deep=deep)
    if as_json:
        echo(json.dumps([_as_json(one) for one in found]))
    else:
        for one in found:
            echo(_line(one, "sound" if deep else "complete"))
        if not found:
            echo(f"{directory} holds no checkpoint yet")
    return any(one.problem and not one.path.name.endswith(PARTIAL) for one in found)


def _line(one: Found, good: str) -> str:
    facts = [time.strftime("%F %T", time.localtime(one.saved)), f"{one.size_bytes / 1e6:,.1f} MB"]
    if one.meta is not None:
        facts += [f"{one.meta.progress.tokens:,} tokens", *_origin(one)]
        facts += ["kept for ever"] if one.meta.kept else []
    return f"{one.path.name}  {', '.join(facts)}: {one.problem or good}"


def _origin(one: Found) -> list[str]:
    assert one.meta is not None
    return [str(one.meta.about[name]) for name in ("layout", "written_by") if name in one.meta.about]


def _as_json(one: Found) -> dict[str, Any]:
    meta = one.meta
    return {
        "path": str(one.path),
        "saved": one.saved,
        "size_bytes": one.size_bytes,
        "problem": one.problem,
        "step": meta.progress.step if meta else None,
        "tokens": meta.progress.tokens if meta else None,
        "kept": meta.kept if meta else None,
        "layout": meta.about.get("layout") if meta else None,
        "written_by": meta.about.get("written_by") if meta else None,
    }
