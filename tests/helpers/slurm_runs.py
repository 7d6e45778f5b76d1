"""Runs on the test cluster: submit, watch, compare with an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from biroute.launcher.attempts.failures import read_heartbeats
from biroute.launcher.attempts.journal import Attempt, read_attempts
from biroute.launcher.attempts.run_files import log_dir
from helpers.corpus import small_run
from helpers.job import points_of
from helpers.slurm_cluster import Cluster, wait_for

# Starting ranks is mostly imports, which a busy machine of two cores stretches.
START_SECONDS = 600.0
PROFILE = "partition: main\ntime_limit: 2:00:00\nnetwork_interface: eth0\n"


@dataclass(frozen=True)
class ClusterRun:
    """A run that was submitted to the cluster."""

    cluster: Cluster
    run_dir: Path
    job_id: str

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.run_dir)

    def step(self) -> int:
        """The last step of which there are metrics; 0 before the first."""
        return max(losses(self.run_dir), default=0)

    def wait_for_step(self, step: int, seconds: float = START_SECONDS) -> None:
        """Until that step, or a later one, is done."""
        self._wait(lambda: self.step() >= step, seconds, f"step {step}")

    def wait_for_attempt(self, number: int, seconds: float = START_SECONDS) -> None:
        """Until attempt `number` has begun."""
        self._wait(lambda: len(self.attempts) >= number, seconds, f"attempt {number}")

    def wait_for_training(self, number: int, seconds: float = START_SECONDS) -> None:
        """Until attempt `number` has finished a step of its own."""
        log = log_dir(self.run_dir, number) / "rank-00000.log"

        def trained() -> bool:
            return log.exists() and any(line.startswith("step ") for line in log.read_text().splitlines())

        self._wait(trained, seconds, f"a step of attempt {number}")

    def wait_for_end(self, seconds: float = START_SECONDS) -> None:
        """Until the run has no job any more."""
        gone = lambda: not self.cluster.client("squeue", "-h", "-j", self.job_id)  # noqa: E731
        self._wait(gone, seconds, "the end of the run")

    def node_of(self, rank: int) -> str:
        """The node that a rank of the newest attempt runs on."""
        logs = log_dir(self.run_dir, self.attempts[-1].number)
        return next(heartbeat.host for heartbeat in read_heartbeats(logs) if heartbeat.rank == rank)

    def resumed_after(self, number: int) -> int:
        """The step after which an attempt went on; 0 if it began anew."""
        lines = (log_dir(self.run_dir, number) / "rank-00000.log").read_text().splitlines()
        prefix = "resumed after step "
        return next((int(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)), 0)

    def story(self) -> str:
        """What happened, for the message of a test that fails."""
        outputs = [path.read_text()[-3000:] for path in sorted((self.run_dir / "logs").glob("slurm-*.out"))]
        logs = sorted((self.run_dir / "logs").glob("attempt-*/rank-*.log"))
        tails = [f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs[-4:]]
        return "\n".join([str(attempt) for attempt in self.attempts] + outputs + tails)

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        try:
            wait_for(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, and no step twice."""
    trained = points_of(run_dir)
    assert len(dict(trained)) == len(trained), "a step is recorded twice"
    return dict(trained)


def write_run(corpus: Path, folder: Path, name: str, *, steps: int, parallel: dict[str, Any], **changes: Any) -> Path:
    """Configuration of a small run in `folder`/runs/`name`, with MLflow; `changes` are fields by section."""
    tree = small_run(corpus, folder / "runs" / name, steps=steps, parallel=parallel)
    del tree["tracking"]
    for section, fields in changes.items():
        tree.setdefault(section, {}).update(fields)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train_undisturbed(config: Path) -> dict[int, float]:
    """Train on this machine alone, without MLflow; the losses."""
    command = [sys.executable, "-m", "biroute.launcher.cli.main", "train", str(config), "tracking.enabled=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return losses(config.parent / "runs" / config.stem)


def submit(
    cluster: Cluster,
    command: Callable[..., Any],
    config: Path,
    nodes: int,
    *overrides: str,
    profile: str = PROFILE,
) -> ClusterRun:
    """Submit a configuration to the cluster's main partition, with the text of a cluster profile."""
    path = config.with_name("cluster.yaml")
    path.write_text(profile)
    arguments = [f"slurm.profile={path}", f"slurm.nodes={nodes}", *overrides, "--json"]
    answer = command("submit", config, *arguments, SLURM_CONF=str(cluster.directory / "slurm.conf"))
    assert answer.status == 0, answer.err
    said = json.loads(answer.out)
    return ClusterRun(cluster, Path(said["run_dir"]), said["job_id"])
