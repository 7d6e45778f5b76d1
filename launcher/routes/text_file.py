"""The text of `--text`, checked. No torch."""

from __future__ import annotations

import codecs
from pathlib import Path

from biroute.configs.errors import UsageError


def read_text(file: Path) -> str:
    """Return the text of a file, as it is, without the mark of UTF-8 at its beginning.

    Raises:
        UsageError: it cannot be read, is empty or is not UTF-8.
    """
    try:
        data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"--text={file}: {error.strerror}; name a text file") from None
    if not data:
        raise UsageError(f"--text={file}: the file is empty; give a text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UsageError(
            f"--text={file}: not UTF-8 (byte 0x{wrong:02x} at position {error.start + 1}); convert the file to UTF-8"
        ) from None
