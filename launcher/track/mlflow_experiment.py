"""The MLflow experiment that new runs go into: found by its name, or created."""

from __future__ import annotations

from typing import Any

from biroute.launcher.track.mlflow_errors import MlflowStateError, code_of
from biroute.launcher.track.uri import artifacts_dir, sqlite_path


def experiment_for_new_run(client: Any, uri: str, name: str) -> str:
    """Return the id of the experiment `name` at `uri`, which is created if it does not exist.

    Raises:
        MlflowStateError: it is deleted there.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(uri)  # a server itself decides where artifacts go
        location = artifacts_dir(database).as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception as error:
            if code_of(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another run created it first
    if experiment.lifecycle_stage == "deleted":
        raise MlflowStateError(f"experiment {name!r} is deleted there; restore it, or set tracking.experiment")
    return str(experiment.experiment_id)
