"""Text out of tokens, as it comes: whole characters only, and nothing that a stop text may still take back.

A token of a byte-fallback vocabulary may be one of the three bytes of a Chinese character, so tokens are turned into
bytes, and bytes into characters once they are complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one text into pieces that can be shown.

    Attributes:
        text: everything that was given out.
        stopped_at: the stop text that ended it; None if none has.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped_at: str | None = None
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the beginning of a stop text

    def push(self, data: bytes) -> str:
        """Take the bytes of the next token, and return what can be shown of the text now.

        Bytes that are no UTF-8 come out as U+FFFD, once it is certain that they are none.
        """
        return self._take(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back: the text ends here, in the middle of a character (U+FFFD) or not."""
        piece = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        if self.stopped_at is not None:
            return piece
        self.text += rest
        return piece + rest

    def _take(self, characters: str) -> str:
        if self.stopped_at is not None:
            return ""
        text = self._held + characters
        found = [(text.find(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The first to begin; of those that begin at the same place, the longest.
            end, _, self.stopped_at = min(found)
            piece, self._held = text[:end], ""
        else:
            keep = self._beginning_of_a_stop(text)
            piece, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += piece
        return piece

    def _beginning_of_a_stop(self, text: str) -> int:
        """Return how many characters at the end of the text may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
