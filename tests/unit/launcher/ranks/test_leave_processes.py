"""The end of a run on GPUs: communicators are closed, and one that hangs keeps no rank alive."""

from __future__ import annotations

import threading

from biroute.launcher.ranks.rendezvous import leave_processes


def test_nccl_is_closed_and_gloo_left_alone() -> None:
    closed: list[str] = []
    assert leave_processes("nccl", lambda: closed.append("nccl"))
    assert leave_processes("gloo", lambda: closed.append("gloo"))
    assert closed == ["nccl"]


def test_a_rank_does_not_wait_for_ever() -> None:
    never = threading.Event()
    assert not leave_processes("nccl", lambda: never.wait(60.0) and None, seconds=0.01)
    never.set()
