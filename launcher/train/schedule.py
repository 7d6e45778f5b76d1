"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from biroute.configs.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (the first is 1) in a run of `total_steps`.

    After a linear warm-up to the peak, schedule `cosine` decays to min_learning_rate, `wsd` (warmup-stable-decay)
    stays constant and decays linearly over the last decay_steps, and `constant` stays constant.
    """
    peak, lowest = optim.learning_rate, optim.min_learning_rate
    warmup_steps = optim.warmup_of(total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "wsd":
        decay = min(1.0, max(0.0, 1 - (total_steps - step) / optim.decay_steps))
        return peak + (lowest - peak) * decay
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
