"""Small files and lines of JSON that may come from somebody else: bounded, typed, and wrong in one way only."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter

from biroute.configs.files import open_regular

_TAIL_BYTES = 1 << 20
LARGEST_BYTES = 64 << 20  # no record file of a run comes near
UnixSeconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # what a calendar can show

_Record = TypeVar("_Record")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_small(path: Path) -> bytes:
    """Read a file of which a sane one is small.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than 64 MiB.
    """
    with open_regular(path) as file:
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"{path} has more than {LARGEST_BYTES >> 20} MiB")
    return content


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a text file, of at most 1 MiB, however large it is.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read(_TAIL_BYTES).decode("utf-8", errors="replace").splitlines()[-count:]


def record_of(kind: type[_Record], fields: Any) -> _Record:
    """Make a dataclass of plain values, each checked against the type of its field.

    Raises:
        ValueError: a field is missing or of another type.
    """
    record: _Record = _adapter(cast(Hashable, kind)).validate_python(fields)
    return record


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
