"""Signals that end the server: the first asks, a later one ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import time
from biroute.launcher.serve.signals import end_signals
with end_signals() as asked:
    print("ready", flush=True)
    print("asked", asked.get(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_a_later_one_ends(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"asked {number}\n"
        process.send_signal(number)  # at once: whoever signals a process and its group means it once
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.1)
        process.send_signal(number)
        assert process.wait(20) == -number
