"""Keeps what libraries print off the terminal: known noise is dropped, real warnings go to the attempt's logs."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from biroute.configs.files import append_file


def silence_known_noise() -> None:
    """Drop messages that mean nothing to users; call before torch is imported."""
    # Kineto announces every start and stop of the profiler at a high level; only a number this large is above it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # "No CUDA runtime is found", where CUDA_HOME is set on a machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A home that is missing, and fonts without Chinese for the title of a curve.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # a default of Megatron-core
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # torch 2.11, at every use


def ignore_library_warnings() -> None:
    """For benchmarks: drop the known noise and every warning of a library."""
    silence_known_noise()
    warnings.filterwarnings("ignore", module=r"(torch|megatron|deepspeed)\..*")


class LibraryWarnings:
    """Captures every warning of this process from now on; writes them to a file as soon as one is given."""

    def __init__(self) -> None:
        silence_known_noise()
        self._path: Path | None = None
        self._waiting: list[str] = []
        warnings.showwarning = self._take

    def write_to(self, path: Path) -> None:
        """Append past and future warnings to `path`; without any, the file is not created."""
        self._path = path
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self._write(text)

    def _take(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        self._write(warnings.formatwarning(message, category, filename, lineno))

    def _write(self, text: str) -> None:
        if self._path is None:
            self._waiting.append(text)
            return
        try:
            with append_file(self._path) as file:
                file.write(text.encode("utf-8", errors="replace"))
        except OSError:  # a full disk must not turn a warning into an error
            return
