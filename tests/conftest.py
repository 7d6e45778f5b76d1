from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from helpers.corpus import build_corpus
from hypothesis import HealthCheck, settings

# The GPU kernels run in Triton's interpreter, program by program on the CPU. Triton looks when it is first imported.
# `make gpu-check` runs their tests compiled, on a GPU.
if os.environ.get("BIROUTE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
# Examples that are drawn are the same in every run, and no busy machine makes their drawing a failure.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")
# Where this is set, as in continuous integration, a test that would be skipped fails instead.
NO_SKIPS = "BIROUTE_NO_SKIPS"

# `nohup make test` and a job in the background of a script begin with signals ignored, and programs that are started
# inherit that. A handler that does nothing keeps the tests as deaf, and gives what they start the usual behaviour.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small real dataset, built once a session."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with tables and no run, to be copied: making one takes seconds."""
    from biroute.launcher.track.mlflow_client import open_client, prepare_mlflow

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    prepare_mlflow(f"sqlite:///{path}", 5.0)
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every test, whichever ran before: a failure comes back."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get(NO_SKIPS) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but {NO_SKIPS} is set: {report.longrepr}"
