"""A real Slurm cluster for tests: tests/system/slurm/dev_cluster.sh with names, addresses and ports of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SCRIPT = Path(__file__).resolve().parents[1] / "system" / "slurm" / "dev_cluster.sh"
NOT_HERE = 3  # the script's status for "this machine cannot have a cluster"
Found = TypeVar("Found")


class NoClusterHereError(Exception):
    """Root, a capability or a package is missing; the message says which."""


@dataclass(frozen=True)
class Cluster:
    """Its nodes are node1 ... node<nodes>; every file of this machine is visible on them."""

    directory: Path
    nodes: int

    @property
    def environment(self) -> dict[str, str]:
        """For client commands (sbatch, squeue, biroute submit)."""
        return {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def verb(self, *arguments: str, check: bool = True) -> str:
        """A verb of dev_cluster.sh: power-off node2, cut node1, bytes ...; what it printed."""
        done = subprocess.run(
            [str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            env={
                **os.environ,
                "DEV_CLUSTER_DIR": str(self.directory),
                "DEV_CLUSTER_OWNER": str(os.getpid()),  # a killed test session leaves no daemon behind
            },
            check=False,
        )
        if done.returncode == NOT_HERE:
            raise NoClusterHereError(done.stderr.strip())
        assert done.returncode == 0 or not check, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def client(self, *command: str) -> str:
        """What a Slurm client command prints; empty if it fails, as squeue does for a job that is gone."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=self.environment, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a table; empty if Slurm has forgotten the job."""
        text = self.client("scontrol", "show", "job", "-o", job_id)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def bytes_sent(self) -> dict[str, int]:
        """Node -> bytes that it has sent since the cluster came up."""
        lines = (line.split() for line in self.verb("bytes").splitlines())
        return {node: int(sent.removeprefix("sent=")) for node, sent, _ in lines}

    def reset(self) -> None:
        """No jobs, every node up and plugged in."""
        self.client("scancel", "--full", "-u", "root")
        for number in range(1, self.nodes + 1):
            node = f"node{number}"
            self.verb("heal", node)
            if not self.verb("exec", node, "hostname", check=False):
                self.verb("power-on", node)
            self.client("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(lambda: not self.client("squeue", "-h", "-o", "%i"), 180, "the jobs to end")
        wait_for(lambda: self._idle_nodes() == self.nodes, 180, "the nodes to be idle")

    def _idle_nodes(self) -> int:
        return len(set(self.client("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()))


def start_cluster(directory: Path, nodes: int) -> Cluster:
    """Bring a cluster up.

    Raises:
        NoClusterHereError: this machine cannot have one.
    """
    cluster = Cluster(directory, nodes)
    cluster.verb("up", str(nodes))
    return cluster


def wait_for(condition: Callable[[], Found], seconds: float, what: str) -> Found:
    """Poll until `condition` answers something true; that answer."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)
    return found
