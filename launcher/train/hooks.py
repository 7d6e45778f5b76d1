"""Hooks into the training loop: derive from `TrainerHook` and pass an instance to `run`.

The trainer calls its hooks in order, on each rank that has any. An exception in a hook ends training like one in the
trainer itself. `Observer` (progress line, metrics, plots) is a hook of rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from biroute.launcher.track.tracker import Status


class TrainerHook:
    """Base class of hooks. Its methods do nothing; override those of interest."""

    def on_message(self, text: str) -> None:
        """Called with a message for the user, one line."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Called after each optimizer step; `values` are its metrics under the names that MLflow shows."""

    def on_point(self, step: int, values: Mapping[str, float]) -> None:
        """Called with metrics to record: every `train.log_every` steps, and after an evaluation."""

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """Called after an evaluation, after `on_point` and with the same values."""

    def on_save(self, step: int, checkpoint: Path, seconds: float) -> None:
        """Called when a checkpoint is on disk under its final name, which took so many seconds."""

    def on_end(self, status: Status, cause: str) -> None:
        """Called once when the attempt ends, however it ends; no other call follows."""
