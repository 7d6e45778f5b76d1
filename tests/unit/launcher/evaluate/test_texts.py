"""Text files: what is read, and what is refused in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.texts import read_texts


def test_documents_are_whole_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("床前\nx" * 1000)
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfmarked")
    lines = [json.dumps({"text": text}) for text in ("one", " ", "two")]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    said: list[str] = []
    found = read_texts([str(tmp_path / "b*"), str(tmp_path / "*"), str(tmp_path / "a.md")], said.append)
    assert found == ["床前\nx" * 1000, "marked", "one", "two"]  # a file that two patterns match comes once
    assert said == ["1 empty documents are left out"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"abc\xff\xfe", "is not UTF-8 (byte 3 is 0xff); convert it"),
        ("中文".encode("gb18030"), "is not UTF-8"),
        ("text".encode("utf-16"), "is UTF-16 text, not UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_texts([str(path)], lambda _: None)
    assert message in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "x.jsonl:2: no text in field 'text'"),
        ("{", "x.jsonl:2: not JSON"),
        ('{"text": "\\ud800"}', "x.jsonl:2: half a surrogate pair"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UsageError) as refused:
        read_texts([str(path)], lambda _: None)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"matches no file: the folder .* is empty; put text there"):
        read_texts([str(tmp_path / "*.txt")], lambda _: None)
    with pytest.raises(UsageError, match="is a folder; name its files"):
        read_texts([str(tmp_path)], lambda _: None)
