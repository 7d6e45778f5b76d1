"""Which signals stop a run."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from biroute.launcher.ranks.stop_signal import StopRequest
if sys.argv[1] == "nohup": signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = StopRequest()
os.kill(os.getpid(), int(sys.argv[2]))
print(stop.signal.name if stop else "none")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_is_remembered(number: signal.Signals) -> None:
    assert said("", number) == number.name


def test_nohup_keeps_a_run_going_when_the_terminal_closes() -> None:
    assert said("nohup", signal.SIGHUP) == "none"
    assert said("nohup", signal.SIGTERM) == "SIGTERM"


def said(how: str, number: signal.Signals) -> str:
    command = [sys.executable, "-c", PROGRAM, how, str(int(number))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
