"""Spikes of loss and gradient norm: when one is seen, what is said and counted."""

from __future__ import annotations

import math

from biroute.launcher.train.spikes import SpikeWatch
from biroute.parallel.engine.engine import StepReport

WINDOW = 8


def watch(said: list[str]) -> SpikeWatch:
    """After a full window of losses of 2.9 and 3.1, norms of 1 and 1.2: bounds 3.6 and 1.7."""
    spikes = SpikeWatch(WINDOW, said.append)
    for step in range(WINDOW):
        spikes.look(step, StepReport(3.0 + 0.1 * (-1) ** step, 1.1 + 0.1 * (-1) ** step), 4 * step, 4 * step + 3)
    return spikes


def test_a_rise_of_the_loss_is_said_once_with_its_sequences_and_counted() -> None:
    said = list[str]()
    spikes = watch(said)
    spikes.look(8, StepReport(3.55, 1.0), 32, 35)
    assert said == [] and spikes.take() == {"train/loss_spike": 0, "train/grad_norm_spike": 0}
    spikes.look(9, StepReport(4.5, 9.0), 36, 39)
    (line,) = said
    assert "step 9 is a spike, loss 4.5 and gradient norm 9," in line
    assert line.endswith("biroute data inspect CONFIG --first 36 --sequences 4")
    spikes.look(10, StepReport(9.0, 1.0), 40, 43)  # it goes on
    assert len(said) == 1
    assert spikes.take() == {"train/loss_spike": 2, "train/grad_norm_spike": 1}
    assert spikes.take() == {"train/loss_spike": 0, "train/grad_norm_spike": 0}


def test_a_skipped_step_is_counted_and_left_to_the_trainer_to_say() -> None:
    said = list[str]()
    spikes = watch(said)
    spikes.look(8, StepReport(3.0, 9.0, skipped=True, spike=True), 32, 35)
    spikes.look(9, StepReport(math.nan, math.nan, skipped=True), 36, 39)
    assert said == [] and spikes.take()["train/grad_norm_spike"] == 1


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    said = list[str]()
    spikes = SpikeWatch(WINDOW, said.append)
    for step in range(WINDOW):
        spikes.look(step, StepReport(2.0**step, 2.0**step), 0, 3)
    assert said == []
