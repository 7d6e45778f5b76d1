"""Prompts of the command line and of files, good and bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.generate.prompts import read_prompts
from biroute.launcher.routes.text_file import read_text


def test_lines_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one\r\ntwo \u2028 床\n".encode())
    assert read_prompts(None, tmp_path / "p.txt") == ["one", "two \u2028 床"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n{"prompt": " ", "other": 1}')
    assert read_prompts(None, tmp_path / "p.jsonl") == ["a\nb", " "]
    assert read_prompts("x", None) == ["x"]


@pytest.mark.parametrize(("name", "line"), [("p.txt", "one\r\n"), ("p.jsonl", '{"prompt": "one"}\r\n')])
def test_the_mark_of_utf_8_is_no_part_of_a_prompt(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text("\ufeff" + line, encoding="utf-8", newline="")
    assert read_prompts(None, tmp_path / name) == ["one"]


def test_the_mark_of_utf_8_is_no_part_of_a_text_of_routes(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\ufeffone", encoding="utf-8")
    assert read_text(tmp_path / "t.txt") == "one"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"good\nb\xffd\n", r"line 2: not UTF-8 \(byte 0xff at position 2\); convert"),
        ("p.txt", b"good\n\nmore\n", "line 2: the prompt is empty; give"),
        ("p.txt", b"", "the file is empty; write one prompt a line"),
        ("p.txt", b"\n", "line 1: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON; write"),
        ("p.jsonl", b'["a"]\n', 'line 1: no text "prompt"; write'),
        ("p.jsonl", b'{"prompt": 3}\n', 'line 1: no text "prompt"; write'),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: the prompt is not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as error:
        read_prompts(None, tmp_path / name)
    assert "\n" not in str(error.value)


def test_exactly_one_of_the_two_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither is given"):
        read_prompts(None, None)
    with pytest.raises(UsageError, match="both are given"):
        read_prompts("x", tmp_path / "p.txt")
    with pytest.raises(UsageError, match=r"p\.txt: No such file"):
        read_prompts(None, tmp_path / "p.txt")
    with pytest.raises(UsageError, match="--prompt: the prompt is empty"):
        read_prompts("", None)
    with pytest.raises(UsageError, match="--prompt: the prompt is not valid UTF-8"):
        read_prompts("a\udcff", None)
