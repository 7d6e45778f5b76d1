"""Ports for the servers of tests, which no other test and no outgoing connection takes in the meantime."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from biroute.configs.files import file_lock

# Below the ports that Linux gives to outgoing connections (32768 to 60999): a port that was free a moment ago
# in that range may belong to any client of the other test process by the time that a rank listens on it.
PORTS = range(10_000, 20_000)  # and below those of Slurm jobs (launcher/ranks/environment.py)

_claims = ExitStack()  # held until this process ends
_next = itertools.count(os.getpid())


def claim_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, this process's own until it ends.

    Raises:
        RuntimeError: every port of the range is taken.
    """
    folder = Path(tempfile.gettempdir()) / f"biroute-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for _ in PORTS:
        port = PORTS[next(_next) % len(PORTS)]
        with ExitStack() as claim:
            try:
                claim.enter_context(file_lock(folder / str(port), 0, required=True))
            except TimeoutError:
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _claims.push(claim.pop_all())
            return port
    raise RuntimeError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")
