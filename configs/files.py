"""The one door to files that BiRoute writes: atomic replacement, appending, new files, a lock between processes.

Whoever writes here follows no symbolic link at the file's name and empties no file that exists: a run folder may be
shared with people who may not change what else its owner has. Whoever reads waits for no pipe.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

_ANYONE, _OWNER_ONLY = 0o666, 0o600  # less what umask takes away
_LOCK_POLL_SECONDS = 0.02


def write_atomically(
    path: Path, content: bytes, *, durable: bool = True, unique: bool = False, private: bool = False
) -> None:
    """Write a file so that a reader sees either all of it or its previous content.

    Args:
        path: the file; its folder must exist. A symbolic link there is replaced, not followed.
        content: the whole content.
        durable: make the write atomic also in case of a power failure.
        unique: use a draft of a unique name, so that processes on several machines may write the file concurrently.
        private: nobody but its owner can read the file, as it may hold a secret.

    Raises:
        OSError: the write failed; the file keeps its previous content, and no draft is left.
    """
    with atomic_draft(path, durable=durable, unique=unique, private=private) as draft:
        draft.write(content)


@contextmanager
def atomic_draft(
    path: Path, *, durable: bool = True, unique: bool = False, private: bool = False
) -> Iterator[BinaryIO]:
    """Yield an empty file, which becomes `path` when the block ends without an exception.

    Arguments and errors are those of `write_atomically`.
    """
    writer = f".{socket.gethostname()}.{os.getpid()}" if unique else ""
    draft = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with new_file(draft, private=private) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        draft.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def new_file(path: Path, *, private: bool = False) -> BinaryIO:
    """Create a file and open it for writing and reading; what had its name, also a symbolic link, is removed.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    mode = _OWNER_ONLY if private else _ANYONE
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w+b")


def try_writing(folder: Path) -> None:
    """Write a file into a folder, and leave nothing there.

    `os.access` would not do: it allows root everything, also where nobody can write, such as in /proc and /sys.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def create_once(path: Path, content: bytes, *, private: bool = False) -> bool:
    """Write a file unless it exists; of several processes only one writes it. Returns whether it was this one.

    Raises:
        OSError: it cannot be written.
    """
    mode = _OWNER_ONLY if private else _ANYONE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return True


def append_file(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file for appending and reading, created if it does not exist.

    In a folder that others can write to, somebody may have put a link there, to a file that only we may change; so
    a link is refused.

    Raises:
        OSError: it cannot be opened, or is a symbolic link or no regular file.
    """
    # Python's own type says BinaryIO only for some of the modes.
    return cast(BinaryIO, open(_open_regular(path, os.O_RDWR | os.O_APPEND), "a+b", buffering=buffering))


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading that may come from somebody else, and do not wait for the writer of a FIFO.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def _open_regular(path: Path, flags: int) -> int:
    """Open or create a regular file, never through a link, and without waiting for the reader of a FIFO."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _ANYONE)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise PlantedFileError(
                error.errno,
                f"{path} is a symbolic link, which BiRoute does not write through; look who made it, and remove it",
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PlantedFileError(errno.EINVAL, f"{path} is not a regular file; look who made it, and remove it")
    return descriptor


class PlantedFileError(OSError):
    """Where BiRoute would write, there is a link or a device, which may be an attack."""


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

    def write(self, data: bytes | memoryview) -> int:
        """Write to the file and update the checksum and the count."""
        self._digest.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def sync(self) -> None:
        """Make what was written durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        """The checksum so far, in hexadecimal digits."""
        return self._digest.hexdigest()


@contextmanager
def file_lock(path: Path, seconds: float, *, required: bool = False) -> Iterator[None]:
    """Hold a lock while the block runs. The kernel releases it even if the process is killed.

    The lock file's content is never touched (the library filelock would empty it).

    Args:
        path: the lock file, created if it does not exist.
        seconds: how long to wait for another holder.
        required: if False, continue without the lock after that time, since the holder may be frozen, and immediately
            on a file system without locks.

    Raises:
        TimeoutError: the lock is required and another process holds it.
        FileNotFoundError: the folder does not exist.
        PlantedFileError: the lock file is a symbolic link or no regular file.
    """
    try:
        descriptor = _open_regular(path, os.O_RDWR)
    except (FileNotFoundError, PlantedFileError):
        raise
    except OSError:  # a read-only file system
        yield
        return
    try:
        if not _locked(descriptor, seconds) and required:
            raise TimeoutError(f"{path} is held by another process")
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, seconds: float) -> bool:
    """Wait for an exclusive lock; False if another process holds it all the time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:  # a file system without locks
            return True
