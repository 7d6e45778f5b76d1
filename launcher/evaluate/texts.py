"""Documents of given text files: of any length, whole, and nothing wrong in them passed over in silence."""

from __future__ import annotations

import codecs
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.json_lines import read_records
from biroute.data_pipeline.prepare.source_file import open_bytes
from biroute.data_pipeline.prepare.sources import why_no_file

_JSON_LINES = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELD = "text"


def read_texts(patterns: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Read the documents of files.

    A `.jsonl` file has one document a line, in the field "text"; any other file is one document. Each may be `.gz` or
    `.zst`. Other than the sources of a dataset, documents are not cut at `data.max_document_bytes`, short ones are
    kept, and what is no UTF-8 is refused, because it would change the result.

    Args:
        patterns: paths, or patterns such as `texts/*.txt`.
        say: told how many documents are empty and left out.

    Returns:
        The documents, in the order of the patterns, the files of a pattern sorted.

    Raises:
        UsageError: a pattern matches no file, or a file is unreadable, empty or not UTF-8, or holds a line that is no
            JSON object with a text.
    """
    documents, empty = list[str](), 0
    for path in _files(patterns):
        texts = list(_texts_of(path))
        kept = [text for text in texts if text and not text.isspace()]
        if not kept:
            raise UsageError(f"--text: {path} holds no text; name a file that does")
        empty += len(texts) - len(kept)
        documents += kept
    if empty:
        say(f"{empty} empty documents are left out")
    return documents


def _files(patterns: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        files = [match for match in matches if Path(match).is_file()]
        if not files:
            raise UsageError(f"--text={pattern} {why_no_file(pattern, folders=bool(matches))}")
        found |= dict.fromkeys(files)
    return list(found)


def _texts_of(path: str) -> Iterator[str]:
    with open_bytes(path, None) as stream:
        if not _JSON_LINES.search(path):
            yield _decode(stream.read(), path).removeprefix("\ufeff")
            return

        def refuse(number: int, _: str, details: str) -> None:
            raise UsageError(f"--text: {path}:{number}: {details}; correct the line or take it away")

        for number, record in read_records(stream, lambda line: _decode(line, path), refuse):
            text = record.get(_FIELD)
            if not isinstance(text, str):
                refuse(number, "", f"no text in field {_FIELD!r}")
            if _SURROGATE.search(str(text)):  # "\ud800" is valid JSON and no Unicode text
                refuse(number, "", "half a surrogate pair, which is no Unicode text")
            yield str(text)


def _decode(data: bytes, path: str) -> str:
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            raise UsageError(f"--text: {path} is UTF-16 text, not UTF-8; convert it, such as with iconv")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text: {path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it, such as "
            "with iconv"
        ) from None
