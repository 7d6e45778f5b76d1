"""The picture of a plan: memory, time of a step, and tokens per second on more nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biroute.launcher.plan.hardware import GIB
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.scaling import weak_scaling
from biroute.launcher.track.figures import new_figure, save_figure

COLOURS = (
    "#3b6fb6", "#d1603d", "#3f8f5b", "#8a5aa8", "#b8892b", "#2b9aa8", "#a83b62", "#6b7a2f", "#7c6a5c", "#9db4d6",
    "#e3a68f", "#9fc7ac",
)  # fmt: skip


def draw_plan(plans: Sequence[Plan], path: Path) -> None:
    """Write a PNG of the plans, side by side, and of the first one on up to 4,096 nodes."""
    figure, (memory, time, curve) = new_figure(3)
    names = [str(plan.layout.world_size) for plan in plans]
    _stack(memory, names, [{k: v / GIB for k, v in plan.memory.parts().items()} for plan in plans])
    available = plans[0].hardware.memory_gib
    if available < 5 * max(plan.memory.total for plan in plans) / GIB:
        memory.axhline(available, color="#202124", linewidth=1, linestyle="--")
    memory.set(title="Peak memory of a rank", xlabel=f"devices; a device has {available:g} GiB", ylabel="GiB")
    _stack(time, names, [plan.step.parts() for plan in plans])
    time.set(title="Time of a step", xlabel="devices", ylabel="seconds")
    points = [(devices, plan.tokens_per_second) for devices, plan in weak_scaling(plans[0])]
    devices, rates = zip(*points, strict=True)
    curve.loglog(devices, rates, color=COLOURS[0], marker="o", markersize=3, label="predicted")
    linear = [rates[0] * n / devices[0] for n in devices]
    curve.loglog(devices, linear, color="#5f6368", linewidth=1, linestyle="--", label="in proportion")
    curve.set(title="More data ranks, same sequences each", xlabel="devices", ylabel="tokens/s")
    curve.legend(title=f"{rates[-1] / linear[-1]:.0%} of it at {devices[-1]:,} devices", title_fontsize=7, fontsize=7)
    save_figure(figure, path)


def _stack(axes: Any, names: list[str], bars: Sequence[Mapping[str, float]]) -> None:
    base = [0.0] * len(bars)
    for part, colour in zip(bars[0], COLOURS, strict=False):
        heights = [bar[part] for bar in bars]
        if any(heights):
            axes.bar(names, heights, bottom=base, color=colour, label=part, width=0.6)
            base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_xlim(-0.6, len(names) + 0.4)
    axes.legend(fontsize=6.5, frameon=False, loc="upper right")
