"""How a conversation becomes a prompt. No torch.

The models are base models: nothing was trained on conversations, so this is a plain script of a dialogue, which a
model continues as it continues any text:

    what the system says

    User: what the user says
    Assistant: what was answered
    User: ...
    Assistant:

The answer ends where the next "User:" line would begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROLES = ("system", "developer", "user", "assistant")
STOP = "\nUser:"
_NAMES = {"user": "User", "assistant": "Assistant"}


class Message(NamedTuple):
    """What somebody says: `role` is one of `ROLES`."""

    role: str
    content: str


def render(messages: Sequence[Message]) -> str:
    """Return the prompt whose continuation is the next answer."""
    said = [
        f"{_NAMES[role]}: {content}\n" if role in _NAMES else f"{content}\n\n"  # the system speaks without a name
        for role, content in messages
    ]
    return "".join(said) + "Assistant:"


class AnswerStream:
    """Passes an answer on without the white space between "Assistant:" and its first word."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, piece: str) -> str:
        """Take the next piece of the text, and return what belongs to the answer."""
        piece = piece if self._begun else piece.lstrip()
        self._begun = self._begun or bool(piece)
        return piece
