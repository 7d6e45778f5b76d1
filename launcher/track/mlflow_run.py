"""The MLflow run of a run folder: found or created, filled with points, files and its description."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from biroute.configs.files import file_lock
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import read_attempts
from biroute.launcher.attempts.run_files import LOGS, METRICS_LOG, UPLOAD_LOCK
from biroute.launcher.track import run_metadata
from biroute.launcher.track.metrics_log import Point
from biroute.launcher.track.mlflow_checkpoints import CheckpointModels
from biroute.launcher.track.mlflow_client import OwnersClient, open_client, set_call_timeout
from biroute.launcher.track.mlflow_errors import MlflowStateError, Trouble, code_of, explain, is_refusal
from biroute.launcher.track.mlflow_experiment import experiment_for_new_run
from biroute.launcher.track.mlflow_note import note_tags
from biroute.launcher.track.mlflow_retry_after import seconds_to_wait
from biroute.launcher.track.run_summary import RunSummary
from biroute.launcher.track.upload_state import KnownCheckpoint, TrackingState
from biroute.launcher.track.uri import experiment_name, run_page

NAME_CHARACTERS = 250  # of a metric or a run
_METRICS_PER_BATCH, _ENTRIES_PER_BATCH = 1000, 100  # MLflow's limits
_PAGE = 1000
_LOCK_SECONDS = 30.0
_RUN_KEY_TAG = "biroute.run_key"
_SENT_TAG = "biroute.sent_bytes"  # of the metrics log, set in the same call as the points
_EXPERIMENT_NOTE = (
    "Runs of BiRoute. Charts to begin with: `train/loss` and `heldout/bits_per_byte` over `progress/tokens`, "
    "`throughput/tokens_per_second`, and `layout/*` to compare layouts."
)


class MlflowRun:
    """The MLflow run that a `TrackingState` names; a `Destination` of the uploader. Calls may block and raise."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        uri: str,
        state: TrackingState,
        say: Callable[[str], None],
        *,
        training: bool = True,
    ) -> None:
        """`say` takes messages for people; without `training` the run is not shown as running."""
        self._config, self._run_dir, self._uri, self._state, self._say = config, run_dir, uri, state, say
        self._training = training
        self._experiment = experiment_name(config)
        self._summary = RunSummary(run_dir)
        self._checkpoints = CheckpointModels(run_dir, state)
        self._client: Any = None
        self._experiment_id = ""
        self._creation_unsure = False
        self._refused: set[str] = set()
        self._nonfinite: dict[str, str] = {}
        self.page = ""  # address of the run for people; "" until connected

    def open_client(self) -> None:
        """Open the store, and create the tables of a new database."""
        client = open_client(self._uri, anew=self._client is not None)
        self._client = OwnersClient(client, self._state.owned)

    def connect(self) -> None:
        """Find or create the run, notice what it lacks of that which was sent, and describe it."""
        self.open_client()
        with file_lock(self._run_dir / UPLOAD_LOCK, _LOCK_SECONDS):  # another process may be creating it
            run = self._find() or self._create()
            if not re.fullmatch("[0-9a-f]{32}", str(run.info.run_id)):
                raise RuntimeError(f"what answers names a run {run.info.run_id!r}, which MLflow never would")
            self._keep(run)
        self._experiment_id = str(run.info.experiment_id)
        self._compare(run)
        if self._training:
            self._client.update_run(self._state.run_id, status="RUNNING")
        self._describe(run)
        page = run_page(self._uri, self._experiment_id, str(self._state.run_id), self._run_dir)
        if page != self.page:
            self.page = page
            self._say(f"run {self._run_name()} of experiment {self._experiment}: {page}")

    def _keep(self, run: Any) -> None:
        """Note which run it is, before anything is sent to it."""
        if self._state.run_id != run.info.run_id:
            self._state.run_id = str(run.info.run_id)
            self._state.save()

    def log_points(self, points: list[Point], end_byte: int) -> None:
        """Send points; `end_byte` is that of the metrics log after them."""
        from mlflow.entities import Metric, RunTag

        metrics = []
        for point in points:
            for name, value in point.metrics.items():
                if math.isfinite(value):
                    metrics.append(Metric(allowed_name(name), value, point.time_ms, point.step))
                else:  # MLflow would draw nan as a gap and inf as 1.8e308
                    self._nonfinite.setdefault(name, f"{name} {value:g} at step {point.step}")
        tags = [RunTag(_SENT_TAG, str(end_byte))]
        if self._nonfinite:
            tags.append(RunTag("nonfinite", "; ".join(self._nonfinite.values())[: run_metadata.TAG_CHARACTERS]))
        for start in range(0, max(1, len(metrics)), _METRICS_PER_BATCH):
            last = start + _METRICS_PER_BATCH >= len(metrics)
            self._log(metrics[start : start + _METRICS_PER_BATCH], tags if last else [])

    def log_artifact(self, path: Path) -> None:
        """Upload a file or folder; what lies in the logs of an attempt keeps that folder's name."""
        attempts = self._run_dir.absolute() / LOGS
        inside = path.parent.relative_to(attempts) if path.is_relative_to(attempts) else Path()
        folder = f"{LOGS}/{inside.parts[0]}" if inside.parts and "shown" not in inside.parts else None
        self._client.log_artifact(self._state.run_id, str(path), folder)

    def log_checkpoints(self) -> None:
        """Bring the logged models of the run's checkpoints up to date."""
        self._checkpoints.update(self._client, self._experiment_id, self._run_name())

    def update_note(self, cause: str = "") -> None:
        """Bring the descriptions of run and experiment up to date; `cause` is why the attempt ends, if it does."""
        self._summary.follow()
        headline = self._state.headline or self._run_name()
        known = self._state.tags | self._config.tracking.tags
        note = self._summary.note(headline, self._config.train.steps, cause, known)
        for name, value in note_tags(note, self._client.get_run(self._state.run_id).data.tags).items():
            self._client.set_tag(self._state.run_id, name, value)
        heldout = self._summary.heldout()
        note = f"{_EXPERIMENT_NOTE}\n\nNewest: {self._run_name()}" + (f", held-out {heldout}" if heldout else "")
        for name, value in note_tags(note, self._client.get_experiment(self._experiment_id).tags).items():
            self._client.set_experiment_tag(self._experiment_id, name, value)

    def terminate(self, status: str, end_ms: int, cause: str) -> None:
        """Set the final status of the attempt, and its cause."""
        if cause:
            this = [a for a in read_attempts(self._run_dir) if a.number == self._state.attempt]
            for name, value in run_metadata.attempt_tags([replace(attempt, cause=cause) for attempt in this]).items():
                self._client.set_tag(self._state.run_id, name, value)
        self._client.set_terminated(self._state.run_id, status, end_ms)

    def lost_run(self, error: Exception) -> bool:
        """Return whether `error` means that the run is gone or its store moved: then connect again."""
        by_mlflow = code_of(error) == "RESOURCE_DOES_NOT_EXIST" or (is_refusal(error) and self._run_is_deleted())
        return by_mlflow or not self._uri.startswith("http")

    def explain(self, error: Exception) -> Trouble:
        """Explain an error of one of the calls above."""
        return explain(error, self._uri)

    def seconds_to_wait(self) -> float:
        """Return for how many seconds a busy server still wants to be left alone; 0 if it does not."""
        return seconds_to_wait()

    def set_timeout(self, seconds: float) -> None:
        """Let each call wait so long for an answer."""
        set_call_timeout(seconds)

    def _run_name(self) -> str:
        name = self._config.tracking.run_name
        if not name:
            layout = self._state.tags.get("layout", "")
            name = self._run_dir.absolute().name + (f" [{_short_layout(layout)}]" if layout else "")
        return name[:NAME_CHARACTERS]

    def _find(self) -> Any:
        """Return the run by its id, or else by its key in any experiment; None if there is none."""
        state = self._state
        if state.run_id is not None:
            run = self._by_id(state.run_id)
            if run is not None:
                return run
        run_id = self._search(everywhere=state.run_id is not None or state.attempt > 1)
        state.forget_run()
        return self._client.get_run(run_id) if run_id else None

    def _by_id(self, run_id: str) -> Any:
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if code_of(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.run_id != run_id:  # something else answers
            raise RuntimeError(f"what answers names run {run.info.run_id!r} where {run_id} was asked for")
        if run.info.lifecycle_stage != "deleted":
            return run
        experiment = self._client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise MlflowStateError(
                f"experiment {experiment.name!r} is deleted there; restore it, or set tracking.experiment"
            )
        self._say(f"run {run_id} was deleted there; all is sent to a new one")
        self._state.begin_new_run()
        return None

    def _search(self, *, everywhere: bool) -> str | None:
        mine = f"tags.`{_RUN_KEY_TAG}` = '{self._state.run_key}'"
        ids = [] if (own := self._client.get_experiment_by_name(self._experiment)) is None else [own.experiment_id]
        if everywhere:  # the experiment may have been renamed
            token = None
            while token != "":
                page = self._client.search_experiments(max_results=_PAGE, page_token=token)
                ids += [one.experiment_id for one in page]
                token = page.token or ""
        for start in range(0, len(ids), _ENTRIES_PER_BATCH):
            found = self._client.search_runs(ids[start : start + _ENTRIES_PER_BATCH], mine, max_results=1)
            if found:
                return str(found[0].info.run_id)
        return None

    def _create(self) -> Any:
        experiment_id = experiment_for_new_run(self._client, self._uri, self._experiment)
        run_id = None
        if self._creation_unsure:
            # A request that timed out at a frozen server may still be executed when the server continues.
            time.sleep(1.0)
            run_id = self._search(everywhere=False)
        if run_id is None:
            self._state.save()  # the key must be on disk before a run has it
            self._creation_unsure = True
            tags = {_RUN_KEY_TAG: self._state.run_key}
            self._state.run_name = self._run_name()
            created = self._client.create_run(experiment_id, self._state.started_ms, tags, self._run_name())
            run_id = str(created.info.run_id)
        self._creation_unsure = False
        return self._client.get_run(run_id)

    def _compare(self, run: Any) -> None:
        """Go back to what the run really holds: its database may have been restored from an older backup."""
        text = run.data.tags.get(_SENT_TAG, "0")
        held = int(text) if text.isdecimal() else 0
        if held < self._state.sent_bytes:
            self._say(f"holds less of {METRICS_LOG} than was sent to it; the rest is sent again")
            self._state.artifacts = dict.fromkeys(self._state.artifacts, "")
            self._state.checkpoints = {step: KnownCheckpoint() for step in self._state.checkpoints}
            self._state.sent_bytes = held
        elif held <= (self._run_dir / METRICS_LOG).stat().st_size:  # the state file may be the older one
            self._state.sent_bytes = held

    def _describe(self, run: Any) -> None:
        """Log new parameters, tags and datasets. MLflow refuses a changed parameter, so a tag records the change."""
        from mlflow.entities import Param, RunTag

        run_id, data = self._state.run_id, run.data
        wanted = run_metadata.parameters(self._config)
        parameters = [Param(name, value) for name, value in wanted.items() if name not in data.params]
        tags = {"attempt": str(self._state.attempt)} | run_metadata.attempt_tags(read_attempts(self._run_dir))
        if self._training or "host" not in data.tags:  # a sync tells nothing of where the run ran
            tags |= run_metadata.environment_tags()
        if run.info.run_name in ("", self._state.run_name):  # one that a person has given stays
            tags["mlflow.runName"] = self._state.run_name = self._run_name()
        tags |= run_metadata.placement_tags(self._config, data.tags) | self._state.tags
        tags |= run_metadata.chosen_tags(self._config)
        if self._state.copied_from:
            tags["copied_from"] = self._state.copied_from
        changed = run_metadata.changed_parameters(data.params, wanted)
        if changed or "config.changed" in data.tags:
            tags["config.changed"] = changed
        entries = [
            RunTag(allowed_name(key), str(value)[: run_metadata.TAG_CHARACTERS]) for key, value in tags.items()
        ]
        for start in range(0, len(parameters), _ENTRIES_PER_BATCH):
            self._client.log_batch(run_id, params=parameters[start : start + _ENTRIES_PER_BATCH])
        for start in range(0, len(entries), _ENTRIES_PER_BATCH):
            self._client.log_batch(run_id, tags=entries[start : start + _ENTRIES_PER_BATCH])
        self._log_datasets(run)
        self._state.save()

    def _log_datasets(self, run: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs}
        inputs = []
        for context, facts in self._state.datasets.items():
            name, digest = facts.name, facts.digest
            if (name, digest) not in known:
                source = json.dumps({"uri": facts.source})
                dataset = Dataset(name, digest, "local", source, profile=json.dumps({"what": facts.profile}))
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self._client.log_inputs(self._state.run_id, inputs)

    def _log(self, metrics: list[Any], tags: list[Any]) -> None:
        try:
            self._client.log_batch(self._state.run_id, metrics=metrics, tags=tags)
        except Exception as error:
            if not is_refusal(error) or self._run_is_deleted() or not metrics:
                raise
            # A metric that MLflow will never accept must not hold up all that follow.
            if len(metrics) > 1:
                middle = len(metrics) // 2
                self._log(metrics[:middle], [])
                self._log(metrics[middle:], tags)
                return
            if metrics[0].key not in self._refused:
                self._refused.add(metrics[0].key)
                self._say(
                    f"refuses metric {metrics[0].key!r} ({self.explain(error).reason}); it stays in {METRICS_LOG}"
                )
            self._log([], tags)

    def _run_is_deleted(self) -> bool:
        try:
            return bool(self._client.get_run(self._state.run_id).info.lifecycle_stage == "deleted")
        except Exception:
            return False


def allowed_name(name: str) -> str:
    """Return a name that MLflow accepts: letters and digits of any script, and `_-. :/`, at most 250 characters."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:NAME_CHARACTERS].strip("/ ") or "_"


def _short_layout(layout: str) -> str:
    """Return the axes of a layout that are in use, such as `tensor 2 data 4`; `1 rank` if none is."""
    axes = [part.split("=") for part in layout.split() if not part.startswith("zero")]
    return " ".join(f"{name} {size}" for name, size in axes if size != "1") or "1 rank"
