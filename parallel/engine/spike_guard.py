"""Skips a step whose gradient is far larger than those of the steps before it, as OLMo's skip-step optimizer does.

Source: the skip-step optimizer of OLMo-core (OLMo 2, arXiv:2501.00656), which looks at loss and norm; here the norm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import fmean, pstdev


class SpikeGuard:
    """Judges the gradient norm of each step.

    Attributes:
        norms: of the last steps, oldest first, those of skipped steps included: so a lasting rise ends as the new
            normal. They belong to the state of a run.
    """

    def __init__(self, deviations: float, window: int) -> None:
        """Guard against norms `deviations` standard deviations above the mean of `window` steps; 0: against none."""
        self._deviations = deviations
        self.norms: deque[float] = deque(maxlen=window)

    @property
    def active(self) -> bool:
        """Whether there is anything to judge."""
        return self._deviations > 0

    def is_spike(self, norm: float) -> bool:
        """Judge the finite norm of one step, and remember it. Until the window is full, nothing is a spike."""
        spike = (
            self.active
            and len(self.norms) == self.norms.maxlen
            and norm > fmean(self.norms) + self._deviations * pstdev(self.norms)
        )
        self.norms.append(norm)
        return spike

    def resume(self, norms: Iterable[float]) -> None:
        """Continue from the norms of a checkpoint."""
        self.norms.clear()
        self.norms.extend(norms)
