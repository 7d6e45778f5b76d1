"""A request of a job, for tests of the batch script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from biroute.configs.cluster_profile import ClusterProfile
from biroute.slurm.script import JobRequest


def request(**changes: Any) -> JobRequest:
    """Two nodes of four ranks for a day, with `changes`."""
    base = JobRequest(
        run_dir=Path("/shared/runs/one"),
        working_dir=Path("/home/someone"),
        profile=ClusterProfile(),
        python=("/usr/bin/python3",),
        host_python="/submitting/python3",
        nodes=2,
        ranks_per_node=4,
        time_limit="24:00:00",
        signal_seconds=120,
        requeue=True,
        max_restarts=3,
    )
    return replace(base, **changes)
