"""The end of a run on GPUs: communicators are closed, and one that hangs keeps no rank alive; time-outs."""

from __future__ import annotations

import threading

from biroute.configs.schema import TrainConfig
from biroute.launcher.ranks.rendezvous import collective_timeout, leave_processes


def test_nccl_is_closed_and_gloo_left_alone() -> None:
    closed: list[str] = []
    assert leave_processes("nccl", lambda: closed.append("nccl"))
    assert leave_processes("gloo", lambda: closed.append("gloo"))
    assert closed == ["nccl"]


def test_a_rank_does_not_wait_for_ever() -> None:
    never = threading.Event()
    assert not leave_processes("nccl", lambda: never.wait(60.0) and None, seconds=0.01)
    never.set()


def test_collectives_wait_longer_than_the_watchdog() -> None:
    """It names the rank that is missing; NCCL would end all of them without a word."""
    for hang, startup, least in ((900.0, 1800.0, 3600), (7200.0, 60.0, 14_400), (30.0, 60.0, 1800)):
        train = TrainConfig(hang_seconds=hang, startup_seconds=startup)
        assert collective_timeout(train).total_seconds() == least > max(hang, startup)
    assert collective_timeout(TrainConfig(hang_seconds=0)).days >= 365, "0 is never"
