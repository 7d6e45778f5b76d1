"""Seconds per phase: exclusive, averaged over the measured steps, nothing from between the steps."""

from __future__ import annotations

import pytest

from biroute.parallel.phase_clock import PHASES, PhaseClock


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set as hands[0]."""
    hands = [0.0]
    monkeypatch.setattr("biroute.parallel.phase_clock.time.perf_counter", lambda: hands[0])
    return hands


def step(clock: PhaseClock, hands: list[float], logged: bool) -> None:
    """Data 1 s; forward 2 s, 0.5 s of communication inside; 4 s of nothing."""
    clock.begin_step(logged)
    with clock.phase("data"):
        hands[0] += 1.0
    with clock.phase("forward"):
        hands[0] += 1.0
        with clock.phase("comm_region"):
            hands[0] += 0.5
        hands[0] += 1.0
    clock.end_step()
    hands[0] += 4.0


def seconds(**some: float) -> dict[str, float]:
    """All other phases are 0."""
    return dict.fromkeys((*PHASES, "exchange"), 0.0) | some


def test_means_over_steps_with_nothing_in_between(hands: list[float]) -> None:
    clock = PhaseClock()
    for logged in (False, False, True):
        step(clock, hands, logged)
        with clock.phase("forward"):  # an evaluation
            hands[0] += 8.0
    assert clock.take() == seconds(data=1.0, forward=2.0, comm_region=0.5, exchange=0.5)
    assert set(clock.take().values()) == {0.0}


def test_a_device_is_waited_for_on_logged_steps_only(hands: list[float]) -> None:
    waits = []

    def synchronize() -> None:
        waits.append(hands[0])
        hands[0] += 0.25  # what the device still had to do

    clock = PhaseClock(synchronize)
    step(clock, hands, logged=False)
    assert not waits
    step(clock, hands, logged=True)
    assert len(waits) == 6
    # Each phase holds the wait at its end, the outer one also that before the nested one began.
    assert clock.take() == seconds(data=1.25, forward=2.5, comm_region=0.75, exchange=0.75)
