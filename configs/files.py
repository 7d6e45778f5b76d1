"""Atomic file writes and a lock between processes; all code uses these functions for them."""

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
    """Write a file so that a reader sees either all of it or its previous content.

    Args:
        path: the file; its folder must exist.
        content: the whole content.
        durable: make the write atomic also in case of a power failure.
        unique: use a draft of a unique name, so that processes on several machines may write the file concurrently.

    Raises:
        OSError: the write failed; the file keeps its previous content, and no draft is left.
    """
    with atomic_draft(path, durable=durable, unique=unique) as draft:
        draft.write_bytes(content)


@contextmanager
def atomic_draft(path: Path, *, durable: bool = True, unique: bool = False) -> Iterator[Path]:
    """Yield the path of a draft, which is renamed to `path` when the block ends without an exception.

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
    """Make renamed, created and removed entries of a folder durable.

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
    """A writable binary file that computes the SHA-256 and counts the bytes of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        """Write to the file and update the checksum and the count."""
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
    """Hold a lock while the block runs. The kernel releases it even if the process is killed.

    Args:
        path: the lock file, created if it does not exist.
        seconds: how long to wait for another holder.
        required: if False, continue without the lock after that time, since the holder may be frozen, and immediately
            on a file system without locks.

    Raises:
        TimeoutError: the lock is required and another process holds it.
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():  # the library would create it
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
