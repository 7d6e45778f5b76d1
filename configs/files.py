"""Files that are written whole or not at all, and a lock between processes. The one place that does either."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout


def write_atomically(path: Path, content: bytes, *, durable: bool = True, unique: bool = False) -> None:
    """Write a file so that a reader sees it whole or not at all.

    Args:
        path: the file; its folder must exist.
        content: all of it.
        durable: whole or not at all also after a power cut.
        unique: several processes, perhaps on several machines, may write it at the same time.

    Raises:
        OSError: the disk refused; the file keeps its last content, and no draft is left.
    """
    with atomic_draft(path, durable=durable, unique=unique) as draft:
        draft.write_bytes(content)


@contextmanager
def atomic_draft(path: Path, *, durable: bool = True, unique: bool = False) -> Iterator[Path]:
    """Give the path of a draft to write to; it becomes `path` when the block ends without an exception.

    Arguments and errors are those of `write_atomically`.
    """
    writer = f".{socket.gethostname()}.{os.getpid()}" if unique else ""
    draft = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield draft
        if durable:
            _sync(draft)
        draft.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make what was renamed, made or removed in a folder durable.

    Raises:
        OSError: the folder cannot be opened.
    """
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashingWriter:
    """A binary file to write to that keeps the SHA-256 and the number of the bytes that went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        """Write to the file, and count."""
        self._digest.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """The checksum so far, in hexadecimal digits."""
        return self._digest.hexdigest()


@contextmanager
def file_lock(path: Path, seconds: float, *, required: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if it is not there; the kernel frees it however we end.

    Args:
        path: the lock's own file.
        seconds: how long to wait for another holder.
        required: False: go on without the lock after that time, since the holder may be frozen, and immediately on a
            file system that has no locks.

    Raises:
        TimeoutError: required, and another process holds it.
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():  # the library would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    lock = FileLock(path, timeout=seconds, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout:
        if required:
            raise TimeoutError(f"{path} is held by another process") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()
