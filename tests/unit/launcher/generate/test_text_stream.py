"""Text as it comes: whole characters, and nothing of a stop text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biroute.launcher.generate.text_stream import TextStream


def test_a_character_of_three_bytes_comes_whole() -> None:
    stream = TextStream()
    data = "床前 moon 明".encode()
    pieces = [stream.push(data[i : i + 1]) for i in range(len(data))]
    assert pieces[:4] == ["", "", "床", ""]
    assert [piece for piece in pieces if piece] == list("床前 moon 明")
    assert stream.finish() == "" and stream.text == "床前 moon 明"


def test_a_text_that_ends_in_a_character_shows_that_it_does() -> None:
    stream = TextStream()
    assert stream.push("明".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.text == "\ufffd"


def test_bytes_that_are_no_text_are_shown_as_such_and_hold_nothing_up() -> None:
    stream = TextStream()
    assert stream.push(b"a\xffb") == "a\ufffdb"
    assert stream.push(b"\xe5") + stream.push(b"c") == "\ufffdc"


@given(
    text=st.text(alphabet="ab床\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab床\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=20),
)
def test_any_pieces_give_the_text_up_to_the_first_stop(text: str, stop: list[str], cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    stream, shown = TextStream(stop), ""
    for begin, end in pairwise(edges):
        shown += stream.push(data[begin:end])
        assert text.startswith(shown)
        if stream.stopped_at is not None:
            break
    shown += stream.finish()
    assert shown == stream.text
    # The stop that is complete first decides, or nothing does.
    ends = {text.find(one) + len(one) for one in stop if one in text}
    if ends:
        assert stream.stopped_at in stop and not any(one in shown for one in stop if one != stream.stopped_at)
        assert text.startswith(shown + str(stream.stopped_at))
    else:
        assert stream.stopped_at is None and shown == text


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "c", "d"], ["cd"], ["ab", "", ""]),  # c is held back
        (["ab", "c", "x"], ["cd"], ["ab", "", "cx"]),  # and given out once it is none
        (["aab"], ["ab"], ["a"]),
        (["a。", "b"], ["。b"], ["a", ""]),
        (["ab"], ["b", "ab"], [""]),  # the one that begins first
    ],
)
def test_what_may_be_a_stop_text_is_held_back(pieces: list[str], stop: list[str], shown: list[str]) -> None:
    stream = TextStream(stop)
    assert [stream.push(piece.encode()) for piece in pieces] == shown
