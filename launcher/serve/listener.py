"""The socket that `biroute serve` listens on. No torch."""

from __future__ import annotations

import socket

from biroute.configs.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `port` of `host`, IPv4 or IPv6; 0 is any free port.

    Raises:
        UsageError: that is not possible.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # So that a port in TIME_WAIT after a restart counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)  # here, as two sockets can be bound to one port until one of them listens
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(f"--host={host} --port={port}: {error.strerror}; choose another with --port") from None
    return listener
