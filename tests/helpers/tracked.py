"""What tests of tracking share: a real MLflow server, and what a store and a run folder hold."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.track.metrics_log import read_points
from helpers.ports import claim_port

LOG_SECONDS = 0.05  # what a log call may take, whatever the server does


def make_config(uri: str = "", **tracking: Any) -> RunConfig:
    section = {"uri": uri, "timeout_seconds": 20.0, "flush_seconds": 60.0, **tracking}
    return config_from_tree({"tracking": section, "train": {"steps": 100}}, "test")


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def state_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "tracking_state.json").read_text())


def history(uri: str, run_dir: Path, name: str = "train/loss") -> list[tuple[int, int, float]]:
    """(step, time in ms, value) of each stored row, in order: a duplicated point shows."""
    rows = client_of(uri).get_metric_history(state_of(run_dir)["run_id"], name)
    return sorted((row.step, row.timestamp, row.value) for row in rows)


def logged(run_dir: Path, name: str = "train/loss") -> list[tuple[int, int, float]]:
    points = read_points(run_dir / "metrics.jsonl")
    return sorted((point.step, point.time_ms, point.metrics[name]) for point in points if name in point.metrics)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for `condition`; the limit is for a machine that is busy with other things."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def troubles(said: list[str]) -> list[str]:
    """What was said, without the lines that tell where the run is."""
    return [line for line in said if "of experiment" not in line and "all is sent" not in line]


def timed_log(tracker: Any, steps: range) -> float:
    """Log a loss for each step; seconds that nine of ten calls stay below.

    No call may take as long as a blocked one would (the time-out, 2 s at least). The strict bound leaves out one
    in ten: on a busy machine the scheduler may take the processor away in the middle of a call.
    """
    taken = []
    for step in steps:
        start = time.perf_counter()
        tracker.log(step, {"train/loss": 10.0 / step, "optim/learning_rate": 1e-3})
        taken.append(time.perf_counter() - start)
        time.sleep(0.01)
    assert max(taken) < 1.0
    return sorted(taken)[int(0.9 * len(taken))]


class Server:
    """An MLflow server that `serve_ui` started, on one port for the whole session."""

    def __init__(self, folder: Path) -> None:
        import sqlite3

        self.folder = folder / "current"  # with modules that nobody asks for
        self.folder.mkdir()
        for name in ("random", "queue", "mlflow", "uvicorn", "biroute"):
            (self.folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
        self.database = folder / "server.db"
        sqlite3.connect(self.database).close()  # serve_ui wants an existing file, an empty one will do
        self.port = claim_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.output = folder / "server.log"
        self._ui: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._ui is not None:
            return
        call = f"serve_ui('sqlite:///{self.database}', {self.port})"
        heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # as `nohup` may have made it deaf
        code = f"{heard}; from biroute.launcher.track.mlflow_ui import serve_ui; {call}"
        with self.output.open("wb") as output:
            program = [sys.executable, "-P", "-c", code]
            self._ui = subprocess.Popen(program, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
        try:
            until(lambda: b"workflowType=machine_learning" in self.output.read_bytes(), 180)
        except AssertionError:
            self.kill()
            raise

    def processes(self) -> list[psutil.Process]:
        assert self._ui is not None
        return psutil.Process(self._ui.pid).children(recursive=True)

    def signal(self, number: int) -> None:
        for process in self.processes():
            process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the server's processes; serve_ui itself sees that and ends."""
        if self._ui is not None:
            self.signal(signal.SIGKILL)
            self._ui.wait(30)
            self._ui = None

    def stop(self) -> list[psutil.Process]:
        """End serve_ui as a terminal does that goes away; returns what is left of its processes."""
        assert self._ui is not None
        processes = self.processes()
        self._ui.send_signal(signal.SIGHUP)
        self._ui.wait(30)
        self._ui = None
        return psutil.wait_procs(processes, timeout=5)[1]
