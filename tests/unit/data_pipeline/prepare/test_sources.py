"""Reading documents: kinds of files, dirt, damage, the held-out split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from helpers.corpora import english_texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.configs.data_section import DataConfig, SourceConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.sources import Document, SourceCounts, read_documents


def read(*paths: Path | str, text_field: str = "text", **limits: float) -> tuple[list[Document], SourceCounts]:
    counts = SourceCounts()
    source = SourceConfig(name="s", paths=tuple(map(str, paths)), text_field=text_field)
    return list(read_documents(source, DataConfig.model_validate(limits), counts)), counts


def texts_of(*paths: Path | str, **limits: float) -> list[str]:
    return [document.text for document in read(*paths, **limits)[0]]


def zstd_frames(data: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` makes."""
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[: len(data) // 2]) + compressor.compress(data[len(data) // 2 :])


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip_members, ".zst": zstd_frames}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_reads_txt_and_jsonl_in_every_compression(tmp_path: Path, suffix: str) -> None:
    texts = list(english_texts(50))
    lines = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in texts).encode()
    (tmp_path / f"b.jsonl{suffix}").write_bytes(COMPRESSIONS[suffix](lines))
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESSIONS[suffix](texts[0].encode()))
    documents, counts = read(tmp_path / f"b.jsonl{suffix}", text_field="body")
    assert [document.text for document in documents] == texts
    assert counts == SourceCounts(documents=50)
    assert texts_of(tmp_path / f"a.txt{suffix}") == [texts[0]]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_file_is_the_users_fault(tmp_path: Path, suffix: str, kept: float) -> None:
    whole = COMPRESSIONS[suffix](os.urandom(20_000).hex().encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UsageError, match=rf"a\.txt\{suffix}: the compressed file is truncated"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_garbage_in_a_compressed_file_is_the_users_fault(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(UsageError, match=r"a\.jsonl.*not an intact compressed file"):
        read(path)


def test_dirt_is_counted_and_never_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first after a byte order mark"}\n'
        b'{"text": "bad \xff\xfe byte"}\n'
        b'{"text": "lone \\ud800 surrogate"}\n'
        b'{"text": ""}\n{"text": " \\n\\t "}\n'
        b'{"text": "shrt"}\n'
        b'\n   \n{"text": 5}\n{"other": "x"}\n["text"]\nnot json\n'
        + b"[" * 5000
        + b'\n{"text": "last, without newline"}'
    )
    documents, counts = read(path, min_document_bytes=5, max_malformed_fraction=1.0, max_invalid_utf8_fraction=0.5)
    assert [document.text for document in documents] == [
        "first after a byte order mark",
        "bad \ufffd\ufffd byte",
        "lone \ufffd surrogate",
        "last, without newline",
    ]
    assert counts == SourceCounts(
        documents=4, empty_documents=2, short_documents=1, invalid_utf8_documents=2, malformed_lines=5,
        no_text_lines=2, no_object_lines=1, not_json_lines=2, records=12,
        examples=[
            f"{path}:9: no text in field 'text'",
            f"{path}:10: no text in field 'text'",
            f"{path}:11: no JSON object",
            f"{path}:12: not JSON (Expecting value at character 1)",
            f"{path}:13: not JSON (nested too deep)",
        ],
    )  # fmt: skip


def test_objects_are_found_where_careless_tools_put_them(tmp_path: Path) -> None:
    """An array on a line, and files that were joined with their byte order marks."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'[{"text": "one"}, {"text": "two"}]\r\n\xef\xbb\xbf{"text": "three"}\n'
        b'{"text": "4"}{"text": "5"}\n\0{"text": "6"}'
    )
    documents, counts = read(path, max_malformed_fraction=0.5)
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert counts.examples == [
        f"{path}:3: not JSON (Extra data at character 14)", f"{path}:4: not JSON (Expecting value at character 1)",
    ]  # fmt: skip


def test_too_many_malformed_lines_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["text"] * 197)
    with path.open("a") as file:
        file.write("x\n" * 2)
    assert read(path, max_malformed_fraction=2 / 199)[1].malformed_lines == 2
    with pytest.raises(
        UsageError, match=r"2 of 199 lines hold no document.*fraction=0\.01: .*a\.jsonl:198: not JSON"
    ) as e:
        read(path)
    assert "a.jsonl:199" in str(e.value)
    write_jsonl(path, ["text"])
    with path.open("a") as file:
        file.write("x\n")
    assert read(path)[1].malformed_lines == 1, "one is no reason to stop, however few the lines"


CHINESE = "人不知而不愠，不亦君子乎？有朋自远方来，不亦乐乎？"


@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("gbk", CHINESE, "GB18030"),
        ("cp1252", "café naïve", "CP1252"),
        ("shift_jis", "これはペンです。カタカナ", None),
    ],
)
def test_text_in_another_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, encoding: str, text: str, named: str | None
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "not utf8.txt"
    good.write_text("plain text")
    bad.write_bytes(text.encode(encoding))
    assert read(good, bad)[1].invalid_utf8_documents == 1, "one is no reason to stop, however few the documents"
    again = tmp_path / "again.txt"
    again.write_bytes((text * 2).encode(encoding))
    with pytest.raises(UsageError, match=r"2 of 3 documents are not UTF-8.*fraction=0\.05.*or raise that") as caught:
        read(good, bad, again)
    command = re.search(r"`(iconv .*?) > FILE`", str(caught.value))
    assert command is not None and (named is None or f"-f {named} " in command[1])
    if named is not None:
        assert subprocess.run(command[1], shell=True, capture_output=True, check=True).stdout.decode() == text
    assert len(read(good, bad, again, max_invalid_utf8_fraction=1.0)[0]) == 3


def test_another_encoding_is_noticed_before_all_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": CHINESE}, ensure_ascii=False).encode("gbk")] * 3000
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=r"101 of 101 documents are not UTF-8.*-f GB18030"):
        read(tmp_path / "a.jsonl")


def test_a_line_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    """A few kilobytes of zstd can hold gigabytes; here a line and a text of 300 MB each."""
    size = 300_000_000
    line = b'{"text": "' + b"x" * size + b'"}\n{"text": "after it"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"x" * size))
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 100_000
    del line
    program = """
import resource, sys
from biroute.configs.data_section import DataConfig, SourceConfig
from biroute.data_pipeline.prepare.sources import SourceCounts, read_documents
counts = SourceCounts()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = SourceConfig(name="s", paths=(sys.argv[1],))
texts = sum(document.size_bytes for document in read_documents(source, DataConfig(), counts))
print(texts, counts.too_long_lines, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    for name, total, too_long in (("a.jsonl.zst", len("after it"), 1), ("b.txt.zst", size, 0)):
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert answer[:2] == [str(total), str(too_long)]
        assert int(answer[2]) < 250, f"{answer[2]} MiB more in memory"


def test_what_follows_gzip_data_is_named_with_a_remedy_that_works(tmp_path: Path) -> None:
    path = tmp_path / "a b.txt.gz"
    path.write_bytes(gzip.compress(b"the text") + b"garbage")
    with pytest.raises(UsageError, match="something else follows the gzip data") as error:
        read(path)
    command = str(error.value).partition("such as with: ")[2]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "intact.gz").rename(path)
    assert texts_of(path) == ["the text"]


def test_invalid_utf8_in_txt_is_counted_once_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\n" * 3000)
    documents, counts = read(tmp_path / "a.txt", max_document_bytes=64, max_invalid_utf8_fraction=1.0)
    assert counts.invalid_utf8_documents == 1
    assert counts.cut_documents == 1
    assert "".join(document.text for document in documents) == "\ufffd\n" * 3000


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_no_part_of_a_cut_document_is_too_short(tmp_path: Path, suffix: str) -> None:
    text = "A" * 100 + "tail"
    path = tmp_path / f"a{suffix}"
    path.write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    documents, counts = read(path, max_document_bytes=50, min_document_bytes=10)
    assert [document.text for document in documents] == ["A" * 50, "A" * 50, "tail"]
    assert counts == SourceCounts(documents=3, cut_documents=1)


_UTF16 = "UTF-16 text; convert it to UTF-8, such as with `iconv -f UTF-16"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt.zst.gz", gzip.compress(zstandard.compress(b"some text")), "zstd data where text belongs; unpack it"),
        ("a.txt", gzip.compress(b"some text"), "gzip data where text belongs; unpack it"),
        ("a.txt.zst", zstandard.compress(gzip.compress(b"some text")), "gzip data where text belongs"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 or UTF-32 text; convert it to UTF-8"),
        ("a.txt", b"\xfe\xff" + "some text".encode("utf-16-be"), "UTF-16 text; convert it to UTF-8"),
        ("a.txt", "some text".encode("utf-16-le"), f"{_UTF16}LE`"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-be"), f"{_UTF16}BE`"),
        ("a.txt", bz2.compress(b"some text"), "bzip2 data where text belongs; unpack it"),
        ("a.txt.gz", gzip.compress(lzma.compress(b"some text")), "xz data where text belongs; unpack it"),
        ("a.txt", b"%PDF-1.7\n", "a PDF file where text belongs"),
        ("a.txt", b"\0\0\xfe\xff" + "some text".encode("utf-32-be"), "UTF-32 text"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / name}: {what}")):
        read(tmp_path / name)


def test_zstd_with_the_longest_window(tmp_path: Path) -> None:
    """As public dumps of forums are packed."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(b"some text") + compressor.flush())
    assert texts_of(tmp_path / "a.txt.zst") == ["some text"]


def test_nothing_but_malformed_lines_names_the_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"], field="content")
    with pytest.raises(UsageError, match=r"none of the 2 lines of .*a\.jsonl .* text field 'text'"):
        read(tmp_path / "a.jsonl")


def test_json_over_several_lines_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}], indent=1))
    (tmp_path / "a.json").rename(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"over several lines: `jq -c \.\[\]` or `jq -c \.` writes each on one"):
        read(tmp_path / "a.jsonl")


def test_source_without_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.txt holds no document \(1 empty"):
        read(tmp_path / "a.txt")


@settings(max_examples=150)
@given(text=st.text(min_size=1, max_size=400), limit=st.integers(16, 120))
def test_parts_lose_nothing_and_keep_the_limit(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int
) -> None:
    # A space-only part would be dropped as empty, a byte order mark at the start is not text.
    text = "x" + "".join("y" if c.isspace() and c != "\n" else c for c in text).replace("\n\n", "\ny")
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_bytes(text.encode())
    parts = texts_of(folder / "a.txt", max_document_bytes=limit)
    assert "".join(parts) in (text, text.rstrip("\n"))  # a last part of a lone newline counts as empty
    assert all(len(part.encode()) <= limit for part in parts)
    write_jsonl(folder / "a.jsonl", [text])
    assert texts_of(folder / "a.jsonl", max_document_bytes=limit) == parts


def test_long_documents_are_cut_after_a_newline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "\n" + "b" * 60 + "\n" + "c" * 10)
    documents, counts = read(tmp_path / "a.txt", max_document_bytes=100)
    assert [document.text for document in documents] == ["a" * 60 + "\n", "b" * 60 + "\n" + "c" * 10]
    assert counts.cut_documents == 1


def test_a_large_text_file_is_cut_across_read_blocks(tmp_path: Path) -> None:
    text = "".join(f"line {n} 汉字\n" for n in range(150_000))
    (tmp_path / "a.txt").write_text(text)
    parts = texts_of(tmp_path / "a.txt", max_document_bytes=10_000)
    assert "".join(parts) == text
    assert all(5_000 <= len(part.encode()) <= 10_000 for part in parts[:-1])


def test_split_depends_on_the_text_alone_and_grows_with_the_fraction(tmp_path: Path) -> None:
    texts = list(english_texts(200))
    write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])

    def heldout(path: Path, fraction: float) -> set[str]:
        documents, _ = read(path, heldout_fraction=fraction)
        kept = {document.text for document in documents if document.heldout}
        assert not kept & {document.text for document in documents if not document.heldout}
        return kept

    small, large = heldout(tmp_path / "a.jsonl", 0.05), heldout(tmp_path / "a.jsonl", 0.3)
    assert small < large
    assert 30 <= len(large) <= 95  # 200 draws of 0.3: five standard deviations
    assert not heldout(tmp_path / "a.jsonl", 0.0)
    assert len(heldout(tmp_path / "a.jsonl", 1.0)) == 200
    (tmp_path / "b.txt").write_text(texts[3])
    assert bool(heldout(tmp_path / "b.txt", 0.3)) == (texts[3] in large)


@pytest.mark.parametrize("parts", [1, 40])
def test_one_book_in_another_encoding_is_refused(tmp_path: Path, parts: int) -> None:
    """However long it is: only few of the documents of its source would be invalid if the book counted as one."""
    text = "".join(f"第{n}章：中文文本，你好世界。\n" for n in range(200))
    (tmp_path / "book.txt").write_bytes(text.encode("gb18030"))
    limit = {"max_document_bytes": len(text.encode("gb18030")) // parts + 40}
    with pytest.raises(UsageError, match=r"documents are not UTF-8.*iconv -f GB18030"):
        read(tmp_path / "book.txt", **limit)
    assert read(tmp_path / "book.txt", max_invalid_utf8_fraction=1.0, **limit)[1].invalid_utf8_documents == 1
    (tmp_path / "book.txt").write_bytes(text.encode() + b"a stray \xff byte")
    assert read(tmp_path / "book.txt", **limit)[1].invalid_utf8_documents == 1


def test_what_follows_zstd_data_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd_frames(b"some text" * 99) + b"not a frame")
    with pytest.raises(UsageError, match=r"something else follows the zstd data; .* zstdcat .*a\.txt\.zst"):
        read(path)
