"""What the benchmarks write: machine and command, tables for the terminal and for docs/benchmarks, pictures."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.files import atomic_draft
from biroute.launcher.track.run_metadata import git_tags

Rows = Sequence[Sequence[str]]

# Dark enough to tell apart on white, in this order; routed variants first, baselines are grey.
COLOURS = ("#3b6fb6", "#d1603d", "#3f8f5b", "#8a5aa8", "#b8892b", "#2b9aa8", "#a83b62", "#6b7a2f", "#7c6a5c")
BASELINE_COLOUR = "#5f6368"


def environment_info() -> dict[str, str]:
    """Machine, software, date and command of this run, for reports."""
    import torch

    commit = git_tags(Path(__file__))
    code = commit.get("git.commit", "unknown")[:10]
    if commit.get("git.dirty") == "true":
        code += ", with uncommitted changes"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{_processor()}, {cores} core(s), {torch.get_num_threads()} thread(s)",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "code": code,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["biroute", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def select(names: Sequence[str], patterns: Sequence[str], default: Sequence[str]) -> list[str]:
    """The names that match any of the patterns (`*` as in file names), in their own order.

    Raises:
        UsageError: a pattern matches nothing.
    """
    from fnmatch import fnmatchcase

    if not patterns:
        return list(default)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--variants {pattern}: no such variant; there are {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def make_folder(path: Path) -> None:
    """Create the folder of a report. Raises UsageError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}; use a folder that can be written") from None


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def print_table(title: str, header: Sequence[str], rows: Rows) -> None:
    """The same table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a file a cut-off table is of no use; in a terminal it is at least seen whole.
    Console(width=console.width if console.is_terminal else max(console.width, 160)).print(table)


def facts_list(facts: dict[str, Any]) -> str:
    """Facts as a Markdown list."""
    quoted = {name: f"`{value}`" if name == "command" else value for name, value in facts.items()}
    return "\n".join(f"- {name}: {value}" for name, value in quoted.items())


def new_figure(columns: int, *, width: float = 5.2, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with `columns` axes side by side, sizes of each in inches."""
    # The object interface, not pyplot: no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in axes:
        one.grid(True, color="#e4e6ea", linewidth=0.7)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.tick_params(labelsize=8.5)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG; a reader never sees half of it."""
    with atomic_draft(path, durable=False) as draft:
        figure.savefig(draft, format="png")


def say(text: str) -> None:
    """Progress, beside the answer on stdout."""
    print(text, file=sys.stderr, flush=True)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def each(values: Sequence[float], digits: int = 3) -> str:
    """The values of all seeds, such as `0.981 0.975`."""
    return " ".join(f"{value:.{digits}f}" for value in values)
