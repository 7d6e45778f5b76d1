"""Plot of a run's loss curves, drawn from its metrics log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.launcher.track.figures import new_figure, save_figure
from biroute.launcher.track.metrics_log import Point, read_points

_TRAIN, _HELDOUT, _BITS = "train/loss", "heldout/loss", "heldout/bits_per_byte"
_TRAIN_COLOUR, _HELDOUT_COLOUR, _LINE_COLOUR = "#3b6fb6", "#d1603d", "#5f6368"
_SMOOTHING_SHARE = 0.01  # standard deviation of the Gaussian smoothing, as a fraction of the number of points

Curve = tuple[list[int], list[float]]  # steps, values


def draw_curves(
    metrics_path: Path,
    image_path: Path,
    *,
    title: str = "",
    bits_per_byte_lines: Mapping[str, float] | None = None,
) -> None:
    """Plot training and held-out loss (nats per token) and held-out bits per byte over the optimizer steps.

    The image is replaced atomically, so a reader never sees a half-written one.

    Args:
        metrics_path: the run's metrics log.
        image_path: the PNG file to write; its folder is created if needed.
        title: shown above the plots.
        bits_per_byte_lines: name -> value of horizontal lines to compare with, such as `{"bigram": 2.9}`.

    Raises:
        UsageError: the metrics log cannot be read or contains no loss.
        OSError: the image cannot be written.
    """
    try:
        points = read_points(metrics_path)
    except OSError as error:
        raise UsageError(f"{metrics_path}: {error.strerror}; give the metrics.jsonl of a run") from None
    train, heldout, bits = (curve_of(points, name) for name in (_TRAIN, _HELDOUT, _BITS))
    if not train[0] and not heldout[0]:
        raise UsageError(f"{metrics_path}: no {_TRAIN} in it yet; train for at least train.log_every steps")
    panels = 2 if bits[0] else 1
    figure, axes = new_figure(panels, height=3.6)
    _draw_loss(axes[0], train, heldout)
    if panels == 2:
        _draw_bits(axes[1], bits, bits_per_byte_lines or {})
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, image_path)


def curve_of(points: Sequence[Point], name: str) -> Curve:
    """Return the finite values of one metric, sorted by step; of a repeated step the first value counts."""
    values: dict[int, float] = {}
    for point in points:
        value = point.metrics.get(name)
        if value is not None and math.isfinite(value):
            values.setdefault(point.step, value)
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Smooth `values` with a Gaussian kernel of standard deviation `width` points, without lag."""
    import numpy as np

    reach = min(len(values) - 1, math.ceil(3 * width))
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # "full", then sliced: "same" would return the length of the kernel where the kernel is longer.
    sums, weights = (np.convolve(row, bell)[reach : reach + len(values)] for row in (values, np.ones(len(values))))
    return [float(mean) for mean in sums / weights]


def _draw_loss(axes: Any, train: Curve, heldout: Curve) -> None:
    steps, losses = train
    if steps:
        window = _SMOOTHING_SHARE * len(losses)
        many = window > 1  # with few points a smoothed curve would add nothing
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
    # Room below: the flat end of a curve could not be read if it lay on the axis.
    axes.set_ylim(low - 0.08 * (high - low or 1.0), high + 0.05 * (high - low or 1.0))
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
