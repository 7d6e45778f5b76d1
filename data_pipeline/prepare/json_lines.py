"""Read JSON Lines as they are found in the wild: what is no record is skipped and named by its line, no error."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

LINE_BYTES = 1 << 26  # a longer line is skipped: a few bytes of a compressed file can hold gigabytes
NOT_JSON, NO_OBJECT, TOO_LONG = "not_json", "no_object", "too_long"  # why a line is skipped


def read_records(
    stream: BinaryIO, decode: Callable[[bytes], str], skipped: Callable[[int, str, str], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object), also of the objects of an array on one line.

    Args:
        stream: the lines.
        decode: turns the bytes of a line into text.
        skipped: called with line number, reason and details of what is no record.
    """
    for number, line in _lines(stream):
        if line is None:
            skipped(number, TOO_LONG, f"longer than {LINE_BYTES >> 20} MiB")
            continue
        line = line.removeprefix(codecs.BOM_UTF8)  # not only in the first line: files are joined
        if not line.strip():
            continue
        try:
            value = json.loads(decode(line))
        except RecursionError:
            skipped(number, NOT_JSON, "not JSON (nested too deep)")
            continue
        except json.JSONDecodeError as error:
            several = "; a value over several lines: `jq -c .[]` or `jq -c .` writes each on one"
            begins = several if line.strip() in (b"[", b"{") else ""
            skipped(number, NOT_JSON, f"not JSON ({error.msg} at character {error.colno}){begins}")
            continue
        except ValueError as error:  # a number of too many digits
            skipped(number, NOT_JSON, f"not JSON ({str(error).split(';')[0]})")
            continue
        for record in value if isinstance(value, list) else [value]:
            if isinstance(record, dict):
                yield number, record
            else:
                skipped(number, NO_OBJECT, "no JSON object")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number, from 1 on; None for one of over LINE_BYTES, which is never held in memory."""
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) <= LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LINE_BYTES)
        yield number, None
