"""What a process asks of Linux about itself."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Let Linux send this process a signal when its parent dies, even if that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
