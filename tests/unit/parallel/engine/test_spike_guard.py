"""Which gradient norms are spikes."""

from __future__ import annotations

import pytest

from biroute.parallel.engine.spike_guard import SpikeGuard


def judged(deviations: float, window: int, norms: list[float]) -> list[bool]:
    guard = SpikeGuard(deviations, window)
    return [guard.is_spike(norm) for norm in norms]


def test_a_spike_is_far_above_the_window() -> None:
    calm = [1.0, 1.2, 0.8, 1.0]  # mean 1, standard deviation sqrt(0.02)
    assert judged(3.0, 4, [*calm, 1.42])[-1] is False
    assert judged(3.0, 4, [*calm, 1.43])[-1] is True
    assert judged(0.0, 4, [*calm, 1e9])[-1] is False, "no guard"
    assert judged(3.0, 5, [*calm, 1e9])[-1] is False, "the window is not full"
    assert judged(3.0, 4, [*calm, 0.0])[-1] is False, "a small gradient is no spike"


def test_a_lasting_rise_becomes_the_normal() -> None:
    found = judged(3.0, 4, [1.0, 1.2, 0.8, 1.0, *[9.0] * 6])
    assert found[4] is True and not any(found[5:])


def test_a_resume_judges_as_the_run_would_have() -> None:
    guard = SpikeGuard(3.0, 4)
    guard.resume([5.0, 1.0, 1.2, 0.8, 1.0])
    assert list(guard.norms) == [1.0, 1.2, 0.8, 1.0]
    assert guard.is_spike(1.43)


@pytest.mark.parametrize(("deviations", "active"), [(0.0, False), (6.0, True)])
def test_zero_turns_it_off(deviations: float, active: bool) -> None:
    assert SpikeGuard(deviations, 2).active is active
