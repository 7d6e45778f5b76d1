"""Read documents from text files: `.txt` (one document per file) and `.jsonl`, uncompressed or gzip or zstd.

Real text is never clean, so the content of a document never causes an error: invalid bytes, malformed lines, empty
and over-long documents are counted and reported. A file that cannot be read (missing or truncated) is an error that
names the file.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, NamedTuple

from biroute.configs.data_section import DataConfig, SourceConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.examples.demo_files import CHINESE_NAME, ENGLISH_NAME
from biroute.data_pipeline.prepare.file_patterns import matching_paths
from biroute.data_pipeline.prepare.json_lines import read_records
from biroute.data_pipeline.prepare.source_file import open_bytes

_SUFFIXES = (".txt", ".jsonl")
_COMPRESSIONS = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
_BEGIN_BYTES = 16  # enough to know a file that is no text
_EXAMPLES = 5
_MALFORMED_OF_FEW = 1  # this many are never too many
_INVALID_OF_FEW = 1
_CLEARLY_INVALID = 100  # documents, if they are also most of those read so far
_ENCODINGS = ("GB18030", "BIG5", "SHIFT_JIS", "EUC-KR", "CP1252")
_GUESSED_BYTES = 100_000
_MOSTLY_INVALID = 0.1  # of the characters: no stray byte, but another encoding
_NOT_KEPT = ("records", "examples", "reading", "invalid_example", "mostly_invalid")  # counts that no manifest keeps
_HELDOUT_FRACTION, _HELDOUT_FRACTION_OF_LITTLE, _LITTLE_BYTES = 0.01, 0.1, 10_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")
# A fixed key instead of the user's seed, so that a document stays held out when the training order changes.
_SPLIT_KEY = b"biroute held-out split 1"


class SourceFile(NamedTuple):
    """A file of a source. `path` is as in the configuration, so that moving the data does not cause a rebuild."""

    path: str
    size_bytes: int
    mtime_ns: int


class Document(NamedTuple):
    """A text to tokenize."""

    text: str
    size_bytes: int  # size of the text in UTF-8
    heldout: bool
    heldout_above: float  # a hash of the text, from 0 to 1: a larger data.heldout_fraction holds it out
    sample_rank: int  # a 64-bit hash of the text; the tokenizer is trained on the documents with the lowest ranks


@dataclass
class SourceCounts:
    """Counts from reading a source. `documents` counts parts after cutting; the others count what is in the files."""

    documents: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    cut_documents: int = 0
    invalid_utf8_documents: int = 0
    malformed_lines: int = 0  # the sum of the four below
    not_json_lines: int = 0
    no_object_lines: int = 0
    no_text_lines: int = 0
    too_long_lines: int = 0
    records: int = field(default=0, compare=False)  # of .jsonl files, the malformed ones included
    reading: str = field(default="", compare=False)  # the file
    invalid_example: tuple[str, str] = field(default=("", ""), compare=False)  # first file not in UTF-8, its encoding
    mostly_invalid: int = field(default=0, compare=False)  # documents that must be in another encoding
    examples: list[str] = field(default_factory=list)  # file, line and reason of the first malformed ones

    def as_dict(self) -> dict[str, int]:
        """Return the counts that a manifest keeps."""
        return {name: count for name, count in asdict(self).items() if name not in _NOT_KEPT}

    def skip_line(self, path: str, number: int, reason: str, details: str) -> None:
        """Count a line without a document, and remember the first ones; `reason` is the name of its count."""
        self.records += 1
        self.malformed_lines += 1
        name = f"{reason}_lines"
        setattr(self, name, getattr(self, name) + 1)
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{path}:{number}: {details}")


def resolve_files(source: SourceConfig) -> list[SourceFile]:
    """Find the files of a source, in the order of its patterns, with the matches of a pattern sorted.

    Each file comes once, however many patterns and links lead to it.

    Raises:
        UsageError: a pattern matches no file or is a URL, a path is a folder or no regular file, or a file is of an
            unknown kind.
    """
    where = f"data.sources[{source.name}].paths"
    found: dict[str, SourceFile] = {}
    seen: dict[tuple[int, int], str] = {}
    for pattern in source.paths:
        if "://" in pattern:
            raise UsageError(f"{where}: {pattern!r} is not on this machine; copy it first, and name the local files")
        pattern = str(Path(pattern).expanduser()) if pattern.startswith("~") else pattern
        matches = [pattern] if Path(pattern).exists() else matching_paths(pattern)
        files = [match for match in matches if not Path(match).is_dir()]
        if not files:
            raise UsageError(f"{where}: {pattern!r} {why_no_file(pattern, folders=bool(matches))}")
        for name in files:
            _kind_of(name)
            try:
                stat = Path(name).stat()
            except OSError as error:  # a dangling link
                if error.errno == errno.ELOOP:  # links that lead in a circle: what they hold is found without them
                    continue
                raise UsageError(f"{where}: {name} cannot be read ({error.strerror})") from None
            if not S_ISREG(stat.st_mode):
                raise UsageError(f"{where}: {name} is not a regular file; name files with text")
            if seen.setdefault((stat.st_dev, stat.st_ino), name) == name:  # a link to a file is the same file
                found[name] = SourceFile(name, stat.st_size, stat.st_mtime_ns)
    return list(found.values())


def why_no_file(pattern: str, *, folders: bool) -> str:
    """Say why a pattern names no file, and what to do; `folders`: it matches folders alone."""
    if not pattern.strip():
        return "is empty; name a file, or take it away"
    if folders:
        return f"is a folder; name its files, such as '{pattern.rstrip('/')}/*.txt'"
    if Path(pattern).name in (ENGLISH_NAME, CHINESE_NAME):
        return f"matches no file; `biroute data demo {shlex.quote(str(Path(pattern).parent))}` makes it"
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parent.parts)
    folder = Path(*fixed)
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"matches no file ({folder}: {error.strerror}); correct the path"
    if not names:
        return f"matches no file: the folder {folder} is empty; put text there, or name another"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"matches no file: {folder} holds {', '.join(names[:3])}{more}; correct the pattern"


def with_heldout_fraction(data: DataConfig, total_bytes: int) -> DataConfig:
    """Return `data` with its fraction of held-out documents; left out, it depends on the bytes of all files."""
    if data.heldout_fraction is not None:
        return data
    fraction = _HELDOUT_FRACTION_OF_LITTLE if total_bytes < _LITTLE_BYTES else _HELDOUT_FRACTION
    return data.model_copy(update={"heldout_fraction": fraction})


def read_documents(
    source: SourceConfig,
    data: DataConfig,
    counts: SourceCounts,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a source in the order of its files.

    A document longer than `data.max_document_bytes` is yielded in parts. It is cut after a newline if there is one in
    the second half of a part, otherwise between characters.

    Args:
        source: the source.
        data: limits of document sizes, and the held-out fraction.
        counts: updated as documents are read.
        on_bytes: called with the number of bytes of the files that were read since its last call.

    Raises:
        UsageError: a file is missing, unreadable or truncated, or the source contains no document.
    """
    for file in resolve_files(source):
        kind = _kind_of(file.path)
        counts.reading = file.path
        with open_bytes(file.path, on_bytes) as stream:
            _check_begin(file.path, stream.peek(_BEGIN_BYTES)[:_BEGIN_BYTES])
            if kind == ".txt":
                parts = _txt_documents(stream, data.max_document_bytes, counts)
            else:
                parts = _jsonl_documents(stream, file.path, source.text_field, data.max_document_bytes, counts)
            for text, cut in parts:
                document = _accept(text, cut, data, counts)
                if document is not None:
                    _check_encoding(source, data, counts, done=False)
                    yield document
    if counts.documents == 0:
        raise UsageError(_why_nothing(source, counts))
    if counts.malformed_lines > max(_MALFORMED_OF_FEW, data.max_malformed_fraction * counts.records):
        raise UsageError(
            f"data.sources[{source.name}]: {counts.malformed_lines:,} of {counts.records:,} lines hold no document, "
            f"more than data.max_malformed_fraction={data.max_malformed_fraction}: {'; '.join(counts.examples)}; "
            "correct the files or raise that fraction"
        )
    _check_encoding(source, data, counts, done=True)


def _check_encoding(source: SourceConfig, data: DataConfig, counts: SourceCounts, *, done: bool) -> None:
    """Refuse a source in another encoding: when all is read, or as soon as it is clear."""
    # The parts of a .txt file are documents here: a book in another encoding is more than one of its many parts.
    invalid = max(counts.invalid_utf8_documents, counts.mostly_invalid)
    most = max(0.5, data.max_invalid_utf8_fraction)
    if done:
        few = 0 if counts.mostly_invalid > counts.documents / 2 else _INVALID_OF_FEW
        too_many = invalid > max(few, data.max_invalid_utf8_fraction * counts.documents)
    else:
        too_many = invalid > _CLEARLY_INVALID and invalid > most * counts.documents
    if too_many:
        path, encoding = counts.invalid_example
        raise UsageError(
            f"data.sources[{source.name}]: {invalid:,} of {counts.documents:,} documents are not UTF-8, more than "
            f"data.max_invalid_utf8_fraction={data.max_invalid_utf8_fraction}; the first is in {path}: convert it, "
            f"such as with `iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > FILE`, or raise that fraction"
        )


def _guess_encoding(data: bytes) -> str:
    """Return the first of the usual encodings that fits the bytes; iconv's name of it."""
    for encoding in _ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(data[:_GUESSED_BYTES])
            return encoding
    return "ENCODING"


# How files begin that are no UTF-8 text, and what to do with them.
_OTHER_CONTENT = {
    rb"\x1f\x8b": "gzip data where text belongs; unpack it",
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd data where text belongs; unpack it",
    rb"\xfd7zXZ\0": "xz data where text belongs; unpack it",
    rb"BZh[1-9]1AY&SY": "bzip2 data where text belongs; unpack it",
    rb"PK\x03\x04": "a zip archive where text belongs; unpack it",
    rb"\x04\x22\x4d\x18": "lz4 data where text belongs; unpack it",
    rb"%PDF-": "a PDF file where text belongs; extract its text",
    rb"PAR1": "a Parquet file where text belongs; write its documents as lines of JSON",
    rb"\xff\xfe": "UTF-16 or UTF-32 text; convert it to UTF-8, such as with iconv",
    rb"\xfe\xff": "UTF-16 text; convert it to UTF-8, such as with iconv",
    rb"\0\0\xfe\xff": "UTF-32 text; convert it to UTF-8, such as with iconv",
    # Without a byte order mark: every ASCII character comes with a NUL.
    rb"([^\0]\0){8}": "UTF-16 text; convert it to UTF-8, such as with `iconv -f UTF-16LE`",
    rb"(\0[^\0]){8}": "UTF-16 text; convert it to UTF-8, such as with `iconv -f UTF-16BE`",
}


def _check_begin(path: str, begin: bytes) -> None:
    """Refuse a file whose first bytes say that it is no UTF-8 text, which would become one senseless document."""
    for mark, what in _OTHER_CONTENT.items():
        if re.match(mark, begin, re.DOTALL):
            raise UsageError(f"{path}: {what}")


def _why_nothing(source: SourceConfig, counts: SourceCounts) -> str:
    if counts.malformed_lines:
        return (
            f"data.sources[{source.name}]: none of the {counts.malformed_lines} lines of {source.paths[0]} is a JSON "
            f"object with a text field {source.text_field!r} ({counts.examples[0]}); correct its field or the file"
        )
    return (
        f"data.sources[{source.name}]: {source.paths[0]} holds no document "
        f"({counts.empty_documents} empty, {counts.short_documents} below data.min_document_bytes); name other files"
    )


def _accept(text: str, cut: bool, data: DataConfig, counts: SourceCounts) -> Document | None:
    """Make a document of a text; `cut`: it is a part of a longer one, of which nothing is left out."""
    if not cut and (not text or text.isspace()):
        counts.empty_documents += 1
        return None
    encoded = text.encode("utf-8")
    if not cut and len(encoded) < data.min_document_bytes:
        counts.short_documents += 1
        return None
    counts.documents += 1
    fraction = _HELDOUT_FRACTION if data.heldout_fraction is None else data.heldout_fraction
    # The split depends on the content alone, so two copies of a text are always in the same split.
    digest = hashlib.blake2b(encoded, digest_size=16, key=_SPLIT_KEY).digest()
    draw = int.from_bytes(digest[:8], "little")
    heldout = draw < fraction * 2.0**64
    return Document(text, len(encoded), heldout, draw / 2.0**64, int.from_bytes(digest[8:], "little"))


def _jsonl_documents(
    stream: BinaryIO, path: str, text_field: str, limit: int, counts: SourceCounts
) -> Iterator[tuple[str, bool]]:
    def skipped(number: int, reason: str, details: str) -> None:
        counts.skip_line(path, number, reason, details)

    for number, record in read_records(stream, lambda line: _decode(line, counts), skipped):
        value = record.get(text_field)
        if not isinstance(value, str):
            skipped(number, "no_text", f"no text in field {text_field!r}")
            continue
        counts.records += 1
        if _SURROGATE.search(value):  # "\ud800" is valid JSON but not valid Unicode text
            counts.invalid_utf8_documents += 1
            counts.invalid_example = counts.invalid_example if counts.invalid_example[0] else (path, "ENCODING")
            value = _SURROGATE.sub("\ufffd", value)
        yield from _cut(value, limit, counts)


def _cut(text: str, limit: int, counts: SourceCounts) -> Iterator[tuple[str, bool]]:
    """Yield a text in parts of at most `limit` bytes, and whether it had to be cut."""
    if len(text) * 4 <= limit:  # a character has at most 4 bytes
        yield text, False
        return
    encoded = text.encode("utf-8")
    cut = len(encoded) > limit
    counts.cut_documents += cut
    start = 0
    while start < len(encoded):
        end = _cut_position(encoded, start, limit)
        yield encoded[start:end].decode("utf-8"), cut
        start = end


def _txt_documents(stream: BinaryIO, limit: int, counts: SourceCounts) -> Iterator[tuple[str, bool]]:
    """Yield the file in parts of at most `limit` bytes, with little more in memory, and whether it is cut."""
    rest = stream.read(max(_BLOCK_BYTES, 2 * limit)).removeprefix(codecs.BOM_UTF8)
    if not rest:
        yield "", False
    cut = len(rest) > limit
    counts.cut_documents += cut
    file_counts = SourceCounts(
        reading=counts.reading
    )  # a file is one document, and counts once even if several parts are invalid
    while rest:
        start = 0
        block = stream.read(max(_BLOCK_BYTES, 2 * limit))
        while len(rest) - start > limit or (not block and start < len(rest)):
            end = _cut_position(rest, start, limit)
            # Decoding may lengthen a part, since U+FFFD takes 3 bytes, so it is cut again.
            before = file_counts.mostly_invalid
            pieces = list(_cut(_decode(rest[start:end], file_counts), limit, SourceCounts()))
            if file_counts.mostly_invalid > before:
                file_counts.mostly_invalid = before + len(pieces)
            for text, again in pieces:
                yield text, cut or again
            start = end
        rest = rest[start:] + block
    if file_counts.invalid_utf8_documents:
        counts.invalid_utf8_documents += 1
        counts.mostly_invalid += file_counts.mostly_invalid
        counts.invalid_example = counts.invalid_example if counts.invalid_example[0] else file_counts.invalid_example


def _cut_position(data: bytes, start: int, limit: int) -> int:
    """Return where a part of at most `limit` bytes from `start` ends: after a newline, or between characters."""
    end = start + limit
    if end >= len(data):
        return len(data)
    newline = data.rfind(b"\n", start + limit // 2, end)
    if newline >= 0:
        return newline + 1
    for character in range(end, end - 4, -1):
        if data[character] & 0xC0 != 0x80:  # not a continuation byte
            return character
    return end  # this is not UTF-8


def _decode(data: bytes, counts: SourceCounts) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        counts.invalid_utf8_documents += 1
        if not counts.invalid_example[0]:
            counts.invalid_example = (counts.reading, _guess_encoding(data))
        text = data.decode("utf-8", errors="replace")
        counts.mostly_invalid += text.count("\ufffd") > _MOSTLY_INVALID * len(text)
        return text


def _kind_of(path: str) -> str:
    stem = Path(path).name.lower()
    for compression in _COMPRESSIONS:
        stem = stem.removesuffix(compression)
    for suffix in _SUFFIXES:
        if stem.endswith(suffix):
            return suffix
    raise UsageError(f"{path}: unknown kind of file; data.sources reads .txt and .jsonl, each also .gz or .zst")
