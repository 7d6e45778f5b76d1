"""Output of the benchmarks: environment, tables for the terminal and for docs/benchmarks, and pictures."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.launcher.track.run_metadata import git_tags

Rows = Sequence[Sequence[str]]

# Colours of routed variants, in this order, dark enough to be distinguished on white; baselines are grey.
COLOURS = ("#3b6fb6", "#d1603d", "#3f8f5b", "#8a5aa8", "#b8892b", "#2b9aa8", "#a83b62", "#6b7a2f", "#7c6a5c")
BASELINE_COLOUR = "#5f6368"


def environment_info(threads: int | None = None) -> dict[str, str]:
    """Return machine, software, date and command of this run for reports; `threads` of a rank, left out: ours."""
    import torch

    commit = git_tags(Path(__file__))
    code = commit.get("git.commit", "unknown")[:10]
    if commit.get("git.dirty") == "true":
        code += ", with uncommitted changes"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{_processor()}, {cores} core(s), {threads or torch.get_num_threads()} thread(s)",
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
    """Select the names that match any of the patterns, in the order of `names`.

    Args:
        names: all names.
        patterns: patterns with `*` as in file names; empty for the default.
        default: the selection without patterns.

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
    """Create the folder of a report.

    Raises:
        UsageError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}; use a folder that can be written") from None


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose other columns are numbers."""

    title: str
    header: Sequence[str]
    rows: Rows

    def markdown(self) -> str:
        """Format the table in Markdown, under its title."""
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.header, rule, *self.rows]]
        return f"## {self.title}\n\n" + "\n".join(lines)

    def show(self) -> None:
        """Print the table to the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        # A terminal limits the width; a file gets at least 160 columns, so that no column is cut off.
        Console(width=console.width if console.is_terminal else max(console.width, 160)).print(table)


@dataclass(frozen=True)
class Findings:
    """Conclusions from the tables, one sentence each, shown in the terminal and on the page."""

    lines: Sequence[str]

    def markdown(self) -> str:
        return "\n".join(f"- {line}" for line in self.lines)

    def show(self) -> None:
        for line in self.lines:
            print(line)


@dataclass(frozen=True)
class Picture:
    """A PNG file next to the page, which `draw(path)` writes."""

    caption: str
    draw: Callable[[Path], None]


Part = str | Table | Findings | Picture


@dataclass(frozen=True)
class Page:
    """The results of a benchmark: tables for the terminal, a Markdown page and a picture for docs/benchmarks.

    Args:
        name: name of the files, without extension.
        introduction: Markdown text that begins with the heading of the page.
        facts: machine, settings and so on, by name.
        parts: the content in the order of the page; text is Markdown and is not shown in the terminal.
    """

    name: str
    introduction: str
    facts: Mapping[str, Any]
    parts: Sequence[Part]

    def show(self) -> None:
        """Print the tables and findings in the terminal."""
        for part in self.parts:
            if isinstance(part, Table | Findings):
                part.show()

    def write(self, folder: Path) -> list[Path]:
        """Write the page and its pictures into `folder`, which is created, and return their paths.

        Raises:
            UsageError: the folder cannot be created.
        """
        make_folder(folder)
        page, pictures = folder / f"{self.name}.md", list[Path]()
        texts = [self.introduction, facts_list(self.facts)]
        for part in self.parts:
            if isinstance(part, Picture):
                number = f"-{len(pictures) + 1}" if pictures else ""
                pictures.append(folder / f"{self.name}{number}.png")
                part.draw(pictures[-1])
                texts.append(f"![{part.caption}]({pictures[-1].name})")
            else:
                texts.append(part if isinstance(part, str) else part.markdown())
        page.write_text("\n\n".join(text.strip("\n") for text in texts if text) + "\n", encoding="utf-8")
        return [page, *pictures]


def facts_list(facts: Mapping[str, Any]) -> str:
    """Format facts as a Markdown list."""
    quoted = {name: f"`{value}`" if name == "command" else value for name, value in facts.items()}
    return "\n".join(f"- {name}: {value}" for name, value in quoted.items())


def say(text: str) -> None:
    """Print progress to stderr, since stdout is for the answer."""
    print(text, file=sys.stderr, flush=True)


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def each(values: Sequence[float], digits: int = 3) -> str:
    """Format the values of all seeds, such as `0.981 0.975`."""
    return " ".join(f"{value:.{digits}f}" for value in values)
