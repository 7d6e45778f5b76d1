"""Every token of a document counts once, with the context that the page promises."""

from __future__ import annotations

import numpy as np
import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.windows import document_windows, number_windows

END = 99


@pytest.mark.parametrize("length", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 7, 8, 9, 20, 33])
def test_every_token_counts_once_and_as_promised(length: int, stride: int, tokens: int) -> None:
    if stride > length:
        with pytest.raises(UsageError, match=rf"--stride={stride} is out of range; use 1 ... {length}"):
            list(document_windows(range(tokens), END, length=length, stride=stride))
        return
    scored = []
    for window in document_windows(range(tokens), END, length=length, stride=stride):
        inputs = len(window.tokens) - 1
        assert 1 <= inputs <= length and 0 <= window.first < inputs
        for target in range(window.first, inputs):
            number = len(scored)  # of the target: the document's tokens and its end
            scored.append(int(window.tokens[target + 1]))
            context = [END, *range(tokens)][: number + 1]
            assert window.tokens[: target + 1].tolist() == context[-target - 1 :]  # consecutive, up to the target
            assert target + 1 >= min(number + 1, max(1, length - stride + 1))
    assert scored == [*range(tokens), END]


def test_the_last_window_has_all_the_context_that_fits() -> None:
    *_, last = document_windows(range(20), END, length=8, stride=8)
    assert last.tokens.tolist() == [*range(12, 20), END] and last.first == 3


def test_windows_know_their_document() -> None:
    documents = [list(document_windows(range(n), END, length=4, stride=4)) for n in (3, 9)]
    assert [one.unit for one in number_windows(documents)] == [0, 1, 1, 1]
    assert all(isinstance(one.tokens, np.ndarray) for one in number_windows(documents))
