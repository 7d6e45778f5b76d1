"""What a process asks of Linux about itself, and its standard streams."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Let Linux send this process a signal when its parent dies, even if that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that was closed, as by `>&-`; call it before any file is opened.

    Otherwise `sys.stdout` is None, and the next file that is opened gets its number and what other code prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is the stream's
        os.set_inheritable(null, True)
        setattr(sys, name, open(null, "w" if number else "r", closefd=False))  # noqa: SIM115 (for the whole life)
