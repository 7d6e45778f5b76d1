"""How much of the server one client may use up, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The bounds that hold for every client.

    Attributes:
        connections: that are open at a time; further ones are answered with 503.
        head_bytes: of a request's first line and headers.
        body_bytes: of a request's body.
        receive_seconds: in which a request must be there, from the first byte to the last.
        idle_seconds: of a connection between two requests.
        send_seconds: in which a client must take what is sent, up to 64 KiB at a time.
        unsent_bytes: that the kernel keeps for a client; it may take twice as much.
        events_behind: of a stream that its client does not read as fast as the model writes.
        drop_seconds: for which the rest of a refused request is read and thrown away.
        answer_seconds: for which the end of the server waits for clients to take their answers, and
        close_seconds: then for connections to close.
    """

    connections: int = 512
    head_bytes: int = 65_536
    body_bytes: int = 16 * 2**20
    receive_seconds: float = 60.0
    idle_seconds: float = 60.0
    send_seconds: float = 60.0
    unsent_bytes: int = 262_144
    events_behind: int = 20_000
    drop_seconds: float = 10.0
    answer_seconds: float = 10.0
    close_seconds: float = 5.0
