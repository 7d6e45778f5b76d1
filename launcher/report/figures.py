"""The pictures of a report: loss against tokens, time and operations; throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biroute.configs.messages import printable
from biroute.launcher.bench.report import COLOURS
from biroute.launcher.report.compare import HELDOUT, LOSS, RATE, ComparedRun
from biroute.launcher.track.figures import new_figure, save_figure

_NAME_CHARACTERS = 40  # of a run in a legend


def draw_losses(runs: Sequence[ComparedRun], names: Sequence[str], path: Path) -> None:
    """Draw training loss as lines and held-out loss as marks, against tokens, seconds of training and operations."""
    figure, axes = new_figure(3)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        train, heldout = run.curve(LOSS), run.curve(HELDOUT)
        for one, kind in zip(axes, ("tokens", "seconds", "flops"), strict=True):
            one.plot(getattr(train, kind), train.values, color=colour, linewidth=1, label=_short(name))
            one.plot(getattr(heldout, kind), heldout.values, color=colour, marker="o", markersize=4, linestyle="")
    titles = (("Loss against tokens", "tokens"), ("against time of training", "seconds"),
              ("against model operations", "FLOPs"))  # fmt: skip
    for one, (title, label) in zip(axes, titles, strict=True):
        one.set(title=title, xlabel=label, ylabel="nats per token; marks: held-out")
        one.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def draw_throughput(runs: Sequence[ComparedRun], names: Sequence[str], path: Path) -> None:
    """Draw tokens per second against tokens, with what was predicted as a dashed line."""
    figure, (axes,) = new_figure(1, width=7.0)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, curve = COLOURS[number % len(COLOURS)], run.curve(RATE)
        axes.plot(curve.tokens, curve.values, color=colour, linewidth=1, label=_short(name))
        wanted, measured = run.predicted("tokens_per_second"), run.most(RATE)
        # A prediction for other hardware would press all curves to the axis; the table has it.
        if wanted is not None and measured is not None and wanted < 5 * measured:
            axes.axhline(wanted, color=colour, linewidth=1, linestyle="--")
    axes.set(title="Throughput; dashed: predicted", xlabel="tokens", ylabel="tokens/s", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def _short(name: str) -> str:
    # matplotlib hides names that begin with an underscore and reads a $ as mathematics.
    name = printable(" ".join(name.split())).replace("$", r"\$").lstrip("_")
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 3]}..."
