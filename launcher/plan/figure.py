"""The picture of a plan: memory, time of a step, and tokens per second on more nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from biroute.launcher.plan.hardware import GIB
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.scaling import scaled
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
    _scaling_curve(curve, plans[0], "weak", COLOURS[0], "same sequences per rank")
    _scaling_curve(curve, plans[0], "strong", COLOURS[1], "same batch")
    curve.set(title="Tokens per second with more data ranks", xlabel="devices", ylabel="tokens/s")
    curve.legend(fontsize=7, frameon=False, loc="upper left")
    save_figure(figure, path)


def _scaling_curve(axes: Any, plan: Plan, mode: Literal["weak", "strong"], colour: str, title: str) -> None:
    devices, rates = zip(*((n, one.tokens_per_second) for n, one in scaled(plan, mode)), strict=True)
    efficiency = rates[-1] / rates[0] / (devices[-1] / devices[0])
    label = f"{title}: {efficiency:.0%} of proportion at {devices[-1]:,}"
    axes.loglog(devices, rates, color=colour, marker="o", markersize=3, label=label)


def _stack(axes: Any, names: list[str], bars: Sequence[Mapping[str, float]]) -> None:
    base = [0.0] * len(bars)
    for part, colour in zip(bars[0], COLOURS, strict=False):
        heights = [bar[part] for bar in bars]
        if any(heights):
            axes.bar(names, heights, bottom=base, color=colour, label=part, width=0.6)
            base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_xlim(-0.6, len(names) + 0.4)
    axes.legend(fontsize=6.5, frameon=False, loc="upper right")
