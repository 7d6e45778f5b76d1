"""What torch and NCCL say when a collective fails: in exceptions, and in the log of a rank that C++ ended. No torch.

NCCL's own watchdog ends a process by SIGABRT, without an exception in Python: then only the rank's log tells why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from biroute.configs.files import open_regular

_LOST_PEER = re.compile(
    r"closed by (remote )?peer|connection reset|broken pipe|remote process exited|network error|socket closed"
    r"|connection refused|socket timeout|recvvalue failed|ncclremoteerror",
    re.IGNORECASE,
)
# A communicator is aborted on all ranks after an error on one, whose reason only that one knows.
_ABORTED = re.compile(r"communicator was aborted", re.IGNORECASE)
_OWN_REASON = re.compile(
    r"unhandled (cuda|system) error|(cuda|cudnn|cublas) (error|failure)|internal (error|check)"
    r"|invalid (usage|argument)|nccl(UnhandledCuda|System|Internal)Error|ncclInvalid",
    re.IGNORECASE,
)
_TIMEOUT = re.compile(
    r"Watchdog caught collective operation timeout: \w+\(SeqNum=(\d+), OpType=(\w+),.*? ran for (\d+) milliseconds"
)
_TERMINATED = re.compile(r"watchdog thread terminated with exception: (.*)")
_AFTER_MESSAGE = re.compile(r"Exception raised from|frame #|CUDA kernel errors might|terminate called|\[rank\d|\s*$")
# `NCCL error in: FILE:LINE, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5 ...`:
# what NCCL itself has to say comes last.
_PREAMBLE = re.compile(r"NCCL error\b.*?\b(nccl\w+): .*?Last error:\s*(?=\S)", re.DOTALL)
_END_BYTES = 256 << 10  # torch writes some KiB between the message and the end of the process
_LINES_OF_MESSAGE = 6


@dataclass(frozen=True)
class Abort:
    """Why NCCL's watchdog ended a rank: a collective that did not end, an error, or the loss of another rank."""

    kind: Literal["hang", "error", "peer"]
    text: str
    lines: tuple[str, ...]  # of the log, from NCCL's message on


def means_lost_peer(text: str) -> bool:
    """Return whether an error is the loss of the connection to another rank, which ended before."""
    if _LOST_PEER.search(text):
        return True
    return bool(_ABORTED.search(text)) and not (_OWN_REASON.search(text) or _TIMEOUT.search(text))


def describe_timeout(text: str) -> str:
    """Return which of NCCL's collectives timed out according to a text; "" if none did."""
    if (found := _TIMEOUT.search(text)) is None:
        return ""
    number, name, milliseconds = found.groups()
    return f"NCCL's {name} (number {number} of its group) did not end within {int(milliseconds) / 1000:.0f} s"


def without_preamble(text: str) -> str:
    """Shorten an error of NCCL to its kind and its last words, which are the reason."""
    return _PREAMBLE.sub(r"\1: ", text)


def find_abort(log: Path) -> Abort | None:
    """Find in the last 256 KiB of a rank's log why NCCL's watchdog ended it; None if it did not."""
    try:
        with open_regular(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            lines = file.read(_END_BYTES).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for at, line in enumerate(lines):
        if timeout := describe_timeout(line):
            return Abort("hang", timeout, tuple(lines[at:]))
        if found := _TERMINATED.search(line):
            text = _message([found[1], *lines[at + 1 : at + _LINES_OF_MESSAGE]])
            return Abort("peer" if means_lost_peer(text) else "error", text, tuple(lines[at:]))
    return None


def _message(lines: Iterable[str]) -> str:
    return "\n".join(takewhile(lambda line: not _AFTER_MESSAGE.match(line), lines))
