"""Notices steps whose loss or gradient norm is far above those before it, and says which sequences they had."""

from __future__ import annotations

import math
from collections.abc import Callable

from biroute.parallel.engine.engine import StepReport
from biroute.parallel.engine.spike_guard import SpikeGuard

DEVIATIONS = 6.0  # standard deviations above the mean of optim.spike_window steps: OLMo's bound, as for skipped steps


class SpikeWatch:
    """Watches the loss and the gradient norm of each step; both are equal on all ranks. It changes no step.

    The bound is that of the spike guard, which can skip a step for its norm. The window starts anew with each
    attempt; until it is full, nothing is a spike. Spikes go into it, so that a lasting rise ends as the new normal.
    """

    def __init__(self, window: int, say: Callable[[str], None]) -> None:
        """Compare with `window` steps; `say` takes a message when spikes begin."""
        self._watched = {name: SpikeGuard(DEVIATIONS, window) for name in ("loss", "gradient norm")}
        self._in_spike = False
        self._counts = dict.fromkeys(self._watched, 0)
        self._say = say

    def look(self, step: int, report: StepReport, first: int, last: int) -> None:
        """Judge one step, which trained on the sequences `first` to `last` of the training order."""
        values = {"loss": report.loss, "gradient norm": report.gradient_norm}
        found = []
        for name, guard in self._watched.items():
            if math.isfinite(values[name]) and guard.is_spike(values[name]):
                self._counts[name] += 1
                found.append(f"{name} {values[name]:g}")
        # Of steps in a row only the first is said; of a skipped one the trainer says the position.
        if found and not self._in_spike and not report.skipped:
            self._say(
                f"warning: step {step} is a spike, {' and '.join(found)}, more than {DEVIATIONS:g} standard "
                f"deviations above the steps before it; see its text with biroute data inspect CONFIG "
                f"--first {first} --sequences {last - first + 1}"
            )
        self._in_spike = bool(found)

    def take(self) -> dict[str, float]:
        """Return the number of steps since the last call that were spikes."""
        loss, norm = self._counts.values()
        self._counts = dict.fromkeys(self._counts, 0)
        return {"train/loss_spike": float(loss), "train/grad_norm_spike": float(norm)}
