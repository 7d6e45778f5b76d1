"""The loss-curve picture of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.files import atomic_draft
from biroute.launcher.track.metrics_log import Point, read_points

_TRAIN, _HELDOUT, _BITS = "train/loss", "heldout/loss", "heldout/bits_per_byte"
_TRAIN_COLOUR, _HELDOUT_COLOUR, _LINE_COLOUR = "#3b6fb6", "#d1603d", "#5f6368"
_SMOOTHING_SHARE = 0.01  # of the points: standard deviation of the smoothing bell

Curve = tuple[list[int], list[float]]  # steps, values


def draw_curves(
    metrics_path: Path,
    image_path: Path,
    *,
    title: str = "",
    bits_per_byte_lines: Mapping[str, float] | None = None,
) -> None:
    """Draw training and held-out loss (nats per token) and held-out bits per byte over the optimizer step.

    `bits_per_byte_lines` are horizontal lines to compare with, such as `{"bigram": 2.9}`. The image is
    replaced at once, so a reader never sees half of it.

    Raises:
        UsageError: no file, or no loss in it.
        OSError: the image cannot be written.
    """
    try:
        points = read_points(metrics_path)
    except OSError as error:
        raise UsageError(f"{metrics_path}: {error.strerror}; give the metrics.jsonl of a run") from None
    train, heldout, bits = (curve_of(points, name) for name in (_TRAIN, _HELDOUT, _BITS))
    if not train[0] and not heldout[0]:
        raise UsageError(f"{metrics_path}: no {_TRAIN} in it yet; train for at least train.log_every steps")
    # The object interface, not pyplot: no global state, so any thread may draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if bits[0] else 1
    figure = Figure(figsize=(5.2 * panels, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharex=True)[0]
    _draw_loss(axes[0], train, heldout)
    if panels == 2:
        _draw_bits(axes[1], bits, bits_per_byte_lines or {})
    if title:
        figure.suptitle(title, fontsize=11)
    image_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_draft(image_path, durable=False) as draft:
        figure.savefig(draft, format="png")


def curve_of(points: Sequence[Point], name: str) -> Curve:
    """The finite values of one metric in the order of steps; of a repeated step the first value counts."""
    values: dict[int, float] = {}
    for point in points:
        value = point.metrics.get(name)
        if value is not None and math.isfinite(value):
            values.setdefault(point.step, value)
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Mean under a bell of standard deviation `width` points around each value; it does not lag behind."""
    import numpy as np

    reach = min(len(values) - 1, math.ceil(3 * width))
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # "full", then cut: "same" would return the kernel's length where that is the longer one.
    sums, weights = (np.convolve(row, bell)[reach : reach + len(values)] for row in (values, np.ones(len(values))))
    return [float(mean) for mean in sums / weights]


def _draw_loss(axes: Any, train: Curve, heldout: Curve) -> None:
    steps, losses = train
    if steps:
        window = _SMOOTHING_SHARE * len(losses)
        many = window > 1  # with few points a smoothed curve would say nothing of its own
        axes.plot(
            steps,
            losses,
            color=_TRAIN_COLOUR,
            alpha=0.3 if many else 1.0,
            linewidth=0.8 if many else 1.4,
            marker="" if len(steps) > 1 else "o",
            label="training",
        )
        if many:
            axes.plot(steps, smooth(losses, window), color=_TRAIN_COLOUR, linewidth=1.6, label="training, smoothed")
    if heldout[0]:
        axes.plot(*heldout, color=_HELDOUT_COLOUR, marker="o", markersize=3, linewidth=1.4, label="held-out")
    _finish(axes, "loss, nats per token", [*losses, *heldout[1]])


def _draw_bits(axes: Any, bits: Curve, lines: Mapping[str, float]) -> None:
    axes.plot(*bits, color=_HELDOUT_COLOUR, marker="o", markersize=3, linewidth=1.4, label="held-out")
    last_step, last_value = bits[0][-1], bits[1][-1]
    axes.annotate(
        f"{last_value:.3f}",
        (last_step, last_value),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=_HELDOUT_COLOUR,
    )
    styles = ("--", ":", "-.")
    for number, (name, value) in enumerate(lines.items()):
        axes.axhline(
            value,
            color=_LINE_COLOUR,
            linestyle=styles[number % len(styles)],
            linewidth=1.1,
            label=f"{name} ({value:.3f})",
        )
    _finish(axes, "held-out bits per byte", [*bits[1], *lines.values()])


def _finish(axes: Any, label: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    low, high = min(values), max(values)
    # Room below: with the flat end of a curve on the axis its level could not be read.
    axes.set_ylim(low - 0.08 * (high - low or 1.0), high + 0.05 * (high - low or 1.0))
    axes.grid(True, color="#e4e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
