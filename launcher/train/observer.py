"""The hook of rank 0: shows each step on the progress line, records points, and redraws the loss curves."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.configs.layout import Layout
from biroute.configs.load import dump_config
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import Dataset
from biroute.launcher.attempts.journal import FencingToken, read_attempts
from biroute.launcher.attempts.run_files import LOSS_PLOT, METRICS_LOG, TOKENIZER, shown_config
from biroute.launcher.plan.cluster import plan_on_cluster
from biroute.launcher.plan.report import headline_tags
from biroute.launcher.track.loss_plot import draw_curves
from biroute.launcher.track.progress_line import ProgressLine
from biroute.launcher.track.run_summary import RunSummary
from biroute.launcher.track.tracker import Status, open_tracker
from biroute.launcher.track.upload_state import DatasetFacts
from biroute.launcher.train.hooks import TrainerHook
from biroute.launcher.train.identity import describe


class Observer(TrainerHook):
    """Tracks a run in its folder and in MLflow. No error here ends training.

    Once another attempt owns the folder, nothing more is written.
    """

    def __init__(
        self, config: RunConfig, layout: Layout, dataset: Dataset, fencing_token: FencingToken, log: TextIO | None
    ) -> None:
        """Open the tracker; what is printed also goes to `log`.

        Raises:
            UsageError: the tracking URI cannot work, or the run folder cannot be written.
        """
        self._run_dir = config.train.run_dir
        self._fencing_token = fencing_token
        self._step_seconds, self._signal_seconds = 0.0, float(config.slurm.signal_seconds)
        streams = [sys.stdout, log] if log is not None else [sys.stdout]
        train = config.train
        self._progress = [ProgressLine(train.steps, log_every=train.log_every, stream=stream) for stream in streams]
        axes = {f"layout/{name}": float(size) for name, size in asdict(layout).items()}
        # What charts compare runs by; sent with the first point.
        self._facts = axes | {
            "layout/ranks": float(layout.world_size),
            "progress/attempt": float(fencing_token.attempt),
        }
        self._tracker = open_tracker(
            config,
            self._run_dir,
            tags={"layout": str(layout), "world_size": str(layout.world_size), **self._predicted(config, layout)},
            headline=describe(config, layout),
            datasets={"train": _about_dataset(dataset)},
            notify=self.on_message,
            fencing_token=fencing_token,
        )
        self._summary, self._attempts = RunSummary(self._run_dir), read_attempts(self._run_dir)
        self._summary.follow()  # what earlier attempts trained; the tracker has made the file
        self._tracker.log_artifact(self._write_shown_config(config))
        self._tracker.log_artifact(self._run_dir / TOKENIZER)

    def _predicted(self, config: RunConfig, layout: Layout) -> dict[str, str]:
        try:
            plan = plan_on_cluster(config, layout)
        except UsageError as error:
            self.on_message(f"warning: nothing is predicted: {error}")
            return {}
        return headline_tags(plan) if plan is not None else {}

    def _write_shown_config(self, config: RunConfig) -> Path:
        path = shown_config(self._run_dir, self._fencing_token.attempt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, without_password(dump_config(config)).encode(), durable=False)
        except OSError as error:
            self.on_message(f"warning: MLflow will not show the configuration: {error}")
        return path

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the step on the progress line."""
        self._step_seconds = values["time/step_seconds"]
        for line in self._progress:
            line.update(step, values)

    def on_point(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics."""
        self._tracker.log(step, {**values, **self._facts, **self._goodput(step, values)})
        self._facts = {}

    def _goodput(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        if "time/step_seconds" not in values:
            return {}
        self._summary.add(step, values)
        share = self._summary.goodput(self._attempts)
        return {} if share is None else {"progress/goodput": share}

    def on_save(self, step: int, checkpoint: Path, seconds: float) -> None:
        """Record what the checkpoint took, and say if the time before a job's limit would not do for another."""
        self._check_time_to_stop(seconds)
        try:
            size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        except OSError:  # a newer one has displaced it
            return
        values = {"checkpoint/step": float(step), "checkpoint/seconds": seconds, "checkpoint/gib": size / 2**30}
        self._tracker.log(step, values)
        self._tracker.log_checkpoint()

    def _check_time_to_stop(self, save_seconds: float) -> None:
        given, needed = self._signal_seconds, self._step_seconds + save_seconds
        if needed <= given or "SLURM_JOB_ID" not in os.environ:
            return
        self._signal_seconds = math.inf  # once is enough
        enough = 60 * math.ceil(2 * needed / 60)
        self.on_message(
            f"warning: a step ({self._step_seconds:.0f} s) and a save ({save_seconds:.0f} s) take longer than "
            f"slurm.signal_seconds={given:.0f}: at its time limit the job may end before it has saved, and lose the "
            f"steps since its last checkpoint; submit or resume with slurm.signal_seconds={enough}"
        )

    def on_message(self, text: str) -> None:
        """Print the message."""
        for line in self._progress:
            line.message(text)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """Plot the loss so far, into the run folder and MLflow."""
        path = self._run_dir / LOSS_PLOT
        if not self._fencing_token.holds():
            return
        try:
            draw_curves(self._run_dir / METRICS_LOG, path, title=self._run_dir.name)
        except (UsageError, OSError) as error:
            self.on_message(f"warning: no loss curve: {error}")
            return
        self._tracker.log_artifact(path)

    def on_end(self, status: Status, cause: str) -> None:
        """Close the tracker of this attempt; what MLflow has not received by then, the next attempt sends."""
        for line in self._progress:
            line.close()
        self._tracker.close(status, cause)


def _about_dataset(dataset: Dataset) -> DatasetFacts:
    """Return what MLflow shows of the dataset that a run is trained on."""
    manifest, folder = dataset.manifest, dataset.config.data.dir.absolute()
    sources = ", ".join(source.name for source in manifest.sources)
    return DatasetFacts(
        name=f"{folder.parent.name}/{folder.name}",
        digest=manifest.checksum[:12],
        source=str(folder),
        profile=f"{manifest.tokens('train'):,} tokens of {sources}",
    )
