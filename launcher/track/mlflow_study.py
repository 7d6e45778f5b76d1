"""The MLflow run of a study: the parent of the runs of its sizes, with their results side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.track.metrics_log import Point
from biroute.launcher.track.mlflow_client import keep_library_logs, open_client, prepare_mlflow
from biroute.launcher.track.mlflow_errors import code_of, explain
from biroute.launcher.track.mlflow_experiment import experiment_for_new_run
from biroute.launcher.track.mlflow_note import note_tags
from biroute.launcher.track.run_metadata import TAG_CHARACTERS, chosen_tags, environment_tags
from biroute.launcher.track.uri import experiment_name, run_page

_KEY_TAG = "biroute.study_key"
_CALL_SECONDS = 60.0  # nothing else waits for the answers


class MlflowStudy:
    """The parent run of a study. Every call may raise a UsageError that says what MLflow refuses."""

    def __init__(self, config: RunConfig, uri: str, folder: Path) -> None:
        """Open the store at `uri`.

        Args:
            config: its section `tracking` names experiment, tags and group.
            uri: the tracking URI.
            folder: of the study; the log of MLflow's libraries goes there.
        """
        self._config, self._uri = config, uri
        self.run_id = ""
        self.page = ""  # where people see the run
        prepare_mlflow(uri, max(_CALL_SECONDS, config.tracking.timeout_seconds))
        keep_library_logs(folder / "mlflow.log")
        try:
            self._client: Any = open_client(uri)
        except Exception as error:
            raise self._explained(error) from error

    def begin(self, key: str, name: str, tags: Mapping[str, str], run_dir: Path) -> None:
        """Find the run with the key of this study, or create it, and show it as running.

        Args:
            key: by which the run is found again.
            name: of a new run.
            tags: in addition to those of the configuration and the environment.
            run_dir: of one of the sizes, whose configuration `biroute ui` can read.
        """
        try:
            experiment_id = experiment_for_new_run(self._client, self._uri, experiment_name(self._config))
            found = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
            run = found[0] if found else self._client.create_run(experiment_id, tags={_KEY_TAG: key}, run_name=name)
            self.run_id = str(run.info.run_id)
            self._set_tags(self.run_id, environment_tags() | chosen_tags(self._config) | dict(tags))
            self._client.update_run(self.run_id, status="RUNNING")
            self.page = run_page(self._uri, experiment_id, self.run_id, run_dir)
        except Exception as error:
            raise self._explained(error) from error

    def show(self, points: Sequence[Point], children: Sequence[str], note: str, files: Sequence[Path]) -> None:
        """Send the results. What is sent again with the same time, step and value is there once.

        Args:
            points: metrics by size: the step of a point is the number of ranks.
            children: MLflow ids of the runs of the sizes; each is listed under this one.
            note: description in Markdown; one that a person has written stays.
            files: the report.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, one.time_ms, one.step) for one in points for name, value in one.metrics.items()
        ]
        try:
            if metrics:
                self._client.log_batch(self.run_id, metrics=metrics)
            for child in children:
                self._adopt(child)
            self._set_tags(self.run_id, note_tags(note, self._client.get_run(self.run_id).data.tags))
            for path in files:
                self._client.log_artifact(self.run_id, str(path))
        except Exception as error:
            raise self._explained(error) from error

    def end(self, status: str) -> None:
        """Set the status: FINISHED, FAILED or KILLED."""
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            raise self._explained(error) from error

    def _adopt(self, child: str) -> None:
        try:
            self._client.set_tag(child, "mlflow.parentRunId", self.run_id)
        except Exception as error:
            if code_of(error) != "RESOURCE_DOES_NOT_EXIST":  # a person has deleted it
                raise

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(run_id, name, value[:TAG_CHARACTERS])

    def _explained(self, error: Exception) -> UsageError:
        reason = explain(error, self._uri).reason
        return UsageError(
            f"MLflow ({without_password(self._uri)}): {reason}; run the same command again, or set "
            "tracking.enabled=false"
        )
