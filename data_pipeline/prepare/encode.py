"""Parallel tokenization of groups of documents, each into a file of tokens."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.data_pipeline.prepare.child_process import become_child, starting_children
from biroute.data_pipeline.prepare.tokenizer import Tokenizer, load_tokenizer
from biroute.data_pipeline.read.manifest import SPLITS


@dataclass(frozen=True)
class Texts:
    """The documents of one part and, for each, whether it is held out."""

    texts: list[str]
    heldout: list[bool]


class PartEncoder:
    """Encodes parts in `workers` processes (0: one per core); with a single worker, in this process."""

    def __init__(self, model: Path, dtype: str, workers: int, on_finished: Callable[[int], None]) -> None:
        """Configure the workers; no process starts before the `with` block.

        Args:
            model: file of the tokenizer.
            dtype: data type of the tokens.
            workers: number of processes; 0 for one per core.
            on_finished: called with the mark of each part, in order, when it and all earlier parts are written.
        """
        self._workers = workers or len(os.sched_getaffinity(0))
        self._arguments = (str(model), dtype)
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[BaseProcess] = set()  # children that are not the pool's
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._on_finished = on_finished

    def __enter__(self) -> PartEncoder:
        if self._workers == 1:
            _set_up(*self._arguments)
        else:
            self._others = set(active_children())
            # spawn, because this process may have threads, and forking is not safe then.
            self._pool = ProcessPoolExecutor(
                self._workers, get_context("spawn"), initializer=_start_worker, initargs=self._arguments
            )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # What they are at is not waited for: they may still be starting. A part is written whole or not at all.
            for child in set(active_children()) - self._others:
                child.kill()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, path: Path, texts: Texts, mark: int) -> None:
        """Queue `texts` for encoding into the file `path`; blocks while too many parts are queued.

        Args:
            path: file to write.
            texts: the documents of the part.
            mark: number to pass to `on_finished`.

        Raises:
            OSError: a part could not be written.
            UsageError: a worker was killed.
        """
        if self._pool is None:
            _encode_part(path, texts)
            self._on_finished(mark)
            return
        with self._explain_death(), starting_children():
            self._waiting.append((self._pool.submit(_encode_part, path, texts), mark))
        while len(self._waiting) > 2 * self._workers:
            self._take()

    def drain(self) -> None:
        """Wait until all parts are written."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        future, mark = self._waiting.popleft()
        with self._explain_death():
            future.result()
        self._on_finished(mark)

    @contextmanager
    def _explain_death(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise UsageError(
                f"data.workers={self._workers}: a tokenising process was killed, perhaps for lack of memory; "
                "lower data.workers and run the same command again to continue"
            ) from None


def read_part(path: Path, split: str) -> np.ndarray:
    """Read the tokens of one split from a part; they are whole documents.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens: np.ndarray = arrays[split]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path}: damaged since it was written ({' '.join(str(error).split())[:80]}); remove the folder "
            f"{path.parent} and run the same command again"
        ) from None
    return tokens


_tokenizer: Tokenizer
_token_bytes: np.ndarray
_dtype: np.dtype[Any]


def _set_up(model: str, dtype: str) -> None:
    global _tokenizer, _token_bytes, _dtype
    _tokenizer = load_tokenizer(Path(model))
    _token_bytes = _tokenizer.token_bytes()
    _dtype = np.dtype(dtype)


def _start_worker(model: str, dtype: str) -> None:
    become_child()  # a worker holds its own work pipe open, and would otherwise wait for ever for a killed parent
    _set_up(model, dtype)


def _encode_part(path: Path, texts: Texts) -> None:
    streams: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    eos = np.array([_tokenizer.eos_id], dtype=_dtype)
    for text, heldout, ids in zip(texts.texts, texts.heldout, _tokenizer.encode_batch(texts.texts), strict=True):
        tokens = np.array(ids, dtype=_dtype)
        if int(_token_bytes[tokens].sum()) != len(text.encode("utf-8")):
            raise RuntimeError(f"the tokens of {text[:60]!r} do not carry its bytes")  # bits per byte would be wrong
        streams["heldout" if heldout else "train"] += [tokens, eos]
    arrays = {split: np.concatenate(parts) if parts else np.empty(0, _dtype) for split, parts in streams.items()}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(path, content.getvalue())
