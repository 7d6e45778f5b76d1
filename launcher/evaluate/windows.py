"""The windows of tokens that are scored: each token exactly once, with as much context as the stride leaves.

A window is what the model gets at once, at most S inputs, S being the length that it was trained with. Held-out
sequences are windows as training cuts them. A document of any length begins behind the end of one (the token that
stands before a document in training) and ends with its own; where it is longer than S, windows overlap: the next one
begins `stride` tokens later, the last one ends with the document, and a window counts only what none before it has.
So every token beyond the first S has at least S - stride + 1 tokens of context, and S of them with a stride of 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from biroute.configs.errors import UsageError


@dataclass(frozen=True)
class Window:
    """Consecutive tokens that the model sees at once."""

    tokens: np.ndarray  # [n + 1] int64: n inputs and, one later, their n targets
    first: int = 0  # of the targets that count here; those before it counted in an earlier window
    unit: int = 0  # number of the document or sequence, which standard errors are over


def document_windows(tokens: Sequence[int], end_of_document: int, *, length: int, stride: int) -> Iterator[Window]:
    """Cut one document into windows.

    Args:
        tokens: of the document, without special ones.
        end_of_document: id of the token that is put before and behind it; the one behind is a target.
        length: S, most inputs of a window.
        stride: tokens from one window's begin to the next one's.

    Raises:
        UsageError: the stride is not within 1 ... length.
    """
    if not 1 <= stride <= length:
        raise UsageError(
            f"--stride={stride} is out of range; use 1 ... {length}, the length of the model's sequences"
        )
    whole = np.array([end_of_document, *tokens, end_of_document], dtype=np.int64)
    begin, scored, targets = 0, 0, len(whole) - 1
    while scored < targets:
        # The last window ends with the document: its targets have the most context that there is.
        begin = min(begin, max(0, targets - length))
        end = min(begin + length, targets)
        yield Window(whole[begin : end + 1], scored - begin)
        scored, begin = end, begin + stride


def number_windows(documents: Sequence[Sequence[Window]]) -> list[Window]:
    """Put the windows of documents into one list, each with the number of its document."""
    return [Window(one.tokens, one.first, unit) for unit, windows in enumerate(documents) for one in windows]
