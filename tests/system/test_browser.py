"""What a person sees in MLflow: pages of a real server in a real browser. `make browser`; needs Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers.tracked import Server, client_of, make_config, state_of

from biroute.launcher.track.run_summary import PREDICTED
from biroute.launcher.track.tracker import open_tracker

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 60_000  # of the page's own clock; MLflow's pages need about 20 s to fill
WIDTH, HEIGHT = 1500, 1100
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]


@dataclass(frozen=True)
class Site:
    """A server with two runs."""

    uri: str
    experiment: str
    runs: dict[str, str]  # name -> id
    folder: Path

    def see(self, page: str, name: str) -> str:
        """Open a page, keep a picture of it, and return the text that it shows."""
        command = [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={self.folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}",
            f"--virtual-time-budget={PATIENCE_MS}",
        ]  # fmt: skip
        address = f"{self.uri}/#/{page}"
        shot = self.folder / f"{name}.png"
        subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, timeout=300, check=True)
        assert shot.stat().st_size > 20_000, "an empty page is a small picture"
        done = subprocess.run(
            [*command, "--dump-dom", address], capture_output=True, text=True, timeout=300, check=True
        )
        return text_of(done.stdout)


def text_of(page: str) -> str:
    """The text between the tags, in one line."""
    page = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("browser")
    server = Server(folder)
    server.start()
    runs = {}
    for name, rate in (("calm-river", 1.0), ("quick-stone", 2.0)):
        run_dir = folder / name
        plan = {"device": "a test device", "step_seconds": "0.5", "tokens_per_second": "8192", "peak_gib": "3.25"}
        tracker = open_tracker(
            make_config(server.uri, experiment="seen", run_name=name), run_dir,
            tags={PREDICTED + key: value for key, value in plan.items()}, headline=f"{name}: a small model",
            notify=lambda _: None,
        )  # fmt: skip
        for step in range(1, 21):
            values = {"train/loss": 4 / (1 + rate * step), "throughput/tokens_per_second": 8000.0 * rate}
            values |= {"time/step_seconds": 0.5 / rate, "progress/tokens": 4096.0 * step, "memory/peak_gib": 3.0}
            tracker.log(step, values)
        (run_dir / "checkpoints" / "step-00000020").mkdir(parents=True)
        tracker.log_checkpoint()
        tracker.close("FINISHED")
        runs[name] = state_of(run_dir)["run_id"]
    experiment = client_of(server.uri).get_experiment_by_name("seen").experiment_id
    yield Site(server.uri, experiment, runs, folder)
    server.kill()


def test_the_page_of_a_run_shows_plan_beside_measured(site: Site) -> None:
    name = "calm-river"
    seen = site.see(f"experiments/{site.experiment}/runs/{site.runs[name]}?workflowType=machine_learning", "run")
    assert f"{name}: a small model" in seen
    assert "predicted 0.5 s a step, 8.19k tokens/s, 3.25 GiB of a rank, on a test device" in seen
    assert "measured 0.5 s a step, 8.19k tokens/s, 3 GiB of a rank" in seen
    assert "train/loss" in seen
    assert "calm-river-step-20" in seen  # the checkpoint, as a logged model


def test_runs_are_compared_by_name_and_value(site: Site) -> None:
    ids = quote(json.dumps(list(site.runs.values())))
    experiments = quote(json.dumps([site.experiment]))
    seen = site.see(f"compare-runs?runs={ids}&experiments={experiments}&workflowType=machine_learning", "compare")
    assert "Comparing 2 Runs from 1 Experiment" in seen
    for shown in (*site.runs, "throughput/tokens_per_second", "8000", "16000"):
        assert shown in seen, shown


def test_charts_of_an_experiment_name_metrics_and_runs(site: Site) -> None:
    seen = site.see(
        f"experiments/{site.experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning", "charts"
    )
    for shown in (*site.runs, "loss", "tokens_per_second"):
        assert shown in seen, shown
