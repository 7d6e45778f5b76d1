"""The MLflow run of a run folder, in a real database."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from biroute.configs.errors import FencedError
from biroute.configs.load import config_from_tree
from biroute.launcher.track.mlflow_client import prepare_mlflow
from biroute.launcher.track.mlflow_run import MlflowRun
from biroute.launcher.track.upload_state import TrackingState


def test_an_attempt_that_is_overtaken_while_it_connects_leaves_the_run_as_it_is(
    tmp_path: Path, mlflow_database: Path
) -> None:
    """As on a node that stood still between any two calls while the next attempt finished the run."""
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    prepare_mlflow(uri, 5.0)
    config = config_from_tree({"train": {"run_dir": str(folder)}}, "test")
    state = TrackingState(folder / "tracking_state.json", f"{uri} biroute")
    newer = MlflowRun(config, folder, uri, state, print)
    newer.connect()
    newer.terminate("FINISHED", 1, "")
    files = {path: path.read_bytes() for path in folder.iterdir()}

    older = MlflowRun(config, folder, uri, state, print)
    for calls in (0, 1):
        left = iter(range(calls))
        state.owned = lambda left=left: next(left, None) is not None
        with pytest.raises(FencedError, match="another attempt owns the run"):
            older.connect()
        assert {path: path.read_bytes() for path in folder.iterdir()} == files
        state.owned = lambda: True
        assert newer._client.get_run(state.run_id).info.status == "FINISHED"
