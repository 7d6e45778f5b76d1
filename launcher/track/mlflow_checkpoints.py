"""Checkpoints as MLflow's logged models: one for each, with its step, its path and the metrics of its step.

No weights are uploaded. A model is found by a tag before it is created, so none is made twice, whatever became of an
earlier request or of the state file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from biroute.launcher.attempts.run_files import CHECKPOINTS, METRICS_LOG
from biroute.launcher.track.metrics_log import points_of_step
from biroute.launcher.track.upload_state import KnownCheckpoint, TrackingState
from biroute.parallel.checkpoint.files import folder_of_step, list_checkpoints

RUN_TAG, STEP_TAG, STATE_TAG = "biroute.run_key", "biroute.step", "checkpoint.state"
MODEL_TYPE = "checkpoint"
_PAGE = 100
ON_DISK, REMOVED = "on disk", "removed"
# Metrics that a model gets, as far as its step has them.
LINKED = ("train/loss", "heldout/loss", "heldout/bits_per_byte", "progress/tokens", "checkpoint/gib")


class CheckpointModels:
    """The logged models of a run's checkpoints."""

    def __init__(self, run_dir: Path, state: TrackingState) -> None:
        self._run_dir, self._state = run_dir.absolute(), state
        self._compared = ""  # the run whose models were looked at

    def update(self, client: Any, experiment_id: str, run_name: str) -> None:
        """Create, complete and mark models, so that they say what is in the run folder. Safe to repeat.

        May raise whatever the client raises; what is done until then is noted.
        """
        if self._compared != self._state.run_id:
            for number, model_id in self._models(client, experiment_id).items():
                known = self._state.checkpoints.setdefault(number, KnownCheckpoint())
                if known.model_id != model_id:
                    self._state.checkpoints[number] = KnownCheckpoint(model_id)
            self._compared = str(self._state.run_id)
        there = {int(path.name.rpartition("-")[2]) for path in list_checkpoints(self._run_dir / CHECKPOINTS)}
        for step in sorted(there):
            self._state.checkpoints.setdefault(str(step), KnownCheckpoint())
        newest = max(map(int, self._state.checkpoints), default=0)
        for key, known in sorted(self._state.checkpoints.items(), key=lambda item: int(item[0])):
            step = int(key)
            if not known.model_id:
                self._create(client, experiment_id, run_name, step, known)
            if step == newest or not known.linked:
                self._link(client, step, known)
            if (step not in there) != known.removed:
                known.removed = step not in there
                client.set_logged_model_tags(known.model_id, {STATE_TAG: REMOVED if known.removed else ON_DISK})
                self._state.save()

    def _create(self, client: Any, experiment_id: str, run_name: str, step: int, known: KnownCheckpoint) -> None:
        """Find or create the model of a checkpoint, and make it an output of the run at its step."""
        from mlflow.entities import LoggedModelOutput

        model_id = self._models(client, experiment_id, step).get(str(step))
        if model_id is None:
            path = folder_of_step(self._run_dir / CHECKPOINTS, step)
            # What the names of models may not hold.
            allowed = "".join(
                " " if letter in "[]" else "-" if letter in "/:.%\"'" else letter for letter in run_name
            )
            model = client.create_logged_model(
                experiment_id, f"{' '.join(allowed.split())[:200]}-step-{step}", self._state.run_id,
                tags={RUN_TAG: self._state.run_key, STEP_TAG: str(step), STATE_TAG: ON_DISK},
                params={"step": str(step), "path": str(path)}, model_type=MODEL_TYPE,
            )  # fmt: skip
            model_id = str(model.model_id)
        client.finalize_logged_model(model_id, "READY")
        client.log_outputs(self._state.run_id, [LoggedModelOutput(model_id, step)])
        known.model_id, known.linked, known.removed = model_id, [], False
        self._state.save()

    def _models(self, client: Any, experiment_id: str, step: int | None = None) -> dict[str, str]:
        """Return the ids of this run's models, or of one step's, by step."""
        wanted = f"tags.`{RUN_TAG}` = '{self._state.run_key}'"
        wanted += "" if step is None else f" AND tags.`{STEP_TAG}` = '{step}'"
        found: dict[str, str] = {}
        token = None
        while token != "":
            page = client.search_logged_models([experiment_id], wanted, max_results=_PAGE, page_token=token)
            found |= {one.tags[STEP_TAG]: str(one.model_id) for one in page if STEP_TAG in one.tags}
            token = page.token or ""
        return found

    def _link(self, client: Any, step: int, known: KnownCheckpoint) -> None:
        """Give the model the metrics of its step: the run's own points, to the millisecond, so that it gets no second
        ones.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, point.metrics[name], point.time_ms, step, model_id=known.model_id)
            for point in points_of_step(self._run_dir / METRICS_LOG, step)
            for name in LINKED
            if name not in known.linked and math.isfinite(point.metrics.get(name, math.nan))
        ]
        if metrics:
            client.log_batch(self._state.run_id, metrics=metrics)
            known.linked += [metric.key for metric in metrics]
            self._state.save()
