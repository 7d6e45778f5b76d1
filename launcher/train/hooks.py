"""What may watch a training run: derive from `TrainerHook` and hand it to `run`.

The trainer calls its hooks in their order, on the ranks that it was given them on. An exception in a hook ends
training as one of the trainer's own would. `Observer` (progress line, metrics, plots) is a hook of rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from biroute.launcher.track.tracker import Status


class TrainerHook:
    """Does nothing; override what is of interest."""

    def on_message(self, text: str) -> None:
        """A line for people."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step is done; `values` are its metrics under the names that MLflow shows."""

    def on_point(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics to keep: every `train.log_every` steps, and those of an evaluation."""

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation is done; called after `on_point` with the same values."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is on disk and has its final name."""

    def on_end(self, status: Status, cause: str) -> None:
        """The attempt ends, in whatever way; nothing is called after this."""
