"""Open a text file, plain or compressed, and tell what is wrong with it by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from biroute.configs.errors import UsageError

_BLOCK_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 10  # at most some 32 MiB of output at a time: four bytes can stand for 128 KiB


@contextlib.contextmanager
def open_bytes(path: str, on_bytes: Callable[[int], None] | None) -> Iterator[io.BufferedReader]:
    """Open a file to read its decompressed bytes; errors while reading become a UsageError that names the file."""
    import zstandard

    decompressed: gzip.GzipFile | None = None
    try:
        with Path(path).open("rb", buffering=0) as raw:
            counted: Any = io.BufferedReader(_CountingFile(raw, on_bytes), _BLOCK_BYTES)  # type: ignore[arg-type]
            if path.lower().endswith(".gz"):
                counted = decompressed = gzip.GzipFile(fileobj=counted, mode="rb")
            elif path.lower().endswith(".zst"):
                counted = _ZstdFile(counted)
            yield io.BufferedReader(counted, _BLOCK_BYTES)  # type: ignore[return-value]
    except EOFError:
        raise UsageError(f"{path}: the compressed file is truncated; fetch or write it again") from None
    except gzip.BadGzipFile as error:
        if decompressed is not None and decompressed.tell():
            raise UsageError(
                f"{path}: something else follows the gzip data ({' '.join(str(error).split())}); take it away, such "
                f"as with: zcat {shlex.quote(path)} 2>/dev/null | gzip > intact.gz"
            ) from None
        raise UsageError(
            f"{path}: not an intact compressed file ({' '.join(str(error).split())}); write it again"
        ) from None
    except _TrailingError:
        raise UsageError(
            f"{path}: something else follows the zstd data; take it away, such as with: zstdcat {shlex.quote(path)} "
            "2>/dev/null | zstd > intact.zst"
        ) from None
    except (zlib.error, zstandard.ZstdError) as error:
        raise UsageError(
            f"{path}: not an intact compressed file ({' '.join(str(error).split())}); write it again"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


class _TrailingError(Exception):
    """What follows a complete frame is none."""


class _CountingFile(io.RawIOBase):
    """A readable file that reports how many bytes are read from it."""

    def __init__(self, raw: BinaryIO, on_bytes: Callable[[int], None] | None) -> None:
        self._raw = raw
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        if self._on_bytes is not None and data:
            self._on_bytes(len(data))
        return len(data)


class _ZstdFile(io.RawIOBase):
    """Decompresses all frames and detects a truncated one, which the library's own stream reader accepts silently."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # `zstd --long=31` is the most
        self._frame: Any = None
        self._frames = 0  # that are complete
        self._begins = False  # nothing of the frame is decompressed yet
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_ZSTD_INPUT_BYTES)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last zstd frame is not complete")
                    return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
                self._begins = True
            self._output = memoryview(self._decompress())
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
                self._frames += 1
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self) -> bytes:
        import zstandard

        try:
            output: bytes = self._frame.decompress(self._input)
        except zstandard.ZstdError:
            if self._begins and self._frames:
                raise _TrailingError from None
            raise
        self._begins = False
        return output
