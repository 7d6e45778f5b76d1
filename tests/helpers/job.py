"""A whole training run as a job of the pool: what a rank does in `biroute train`, without starting processes anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_job(tree: dict[str, Any]) -> str:
    """Train to the end or until stopped; how it ended, in words."""
    import torch.distributed as dist

    from biroute.configs.errors import FencedError, StoppedError
    from biroute.configs.load import config_from_tree
    from biroute.launcher.attempts.journal import FencingToken
    from biroute.launcher.attempts.run_files import log_dir
    from biroute.launcher.attempts.watchdog import Watchdog
    from biroute.launcher.ranks.rendezvous import Place, begin_joint_attempt
    from biroute.launcher.ranks.stop_signal import StopRequest
    from biroute.launcher.train.session import run

    config = config_from_tree(tree, "test")
    place = Place(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    stop = StopRequest()
    fencing_token = FencingToken(config.train.run_dir, begin_joint_attempt(config.train.run_dir, place.world_size))
    watchdog = Watchdog()
    logs = log_dir(config.train.run_dir, fencing_token.attempt)
    watchdog.watch(logs, place.rank, place.world_size, hang_seconds=0, startup_seconds=600)
    try:
        run(config, place, stop, fencing_token, watchdog)
    except (StoppedError, FencedError) as end:
        return f"{type(end).__name__}: {end}"
    finally:
        watchdog.close()
    return "finished"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that may be written to now: a last one that is there in part is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def points_of(run_dir: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """(step, value) of each point of a metric, in the order they were written."""
    points = lines_of(run_dir / "metrics.jsonl")
    return [(p["step"], p["metrics"][name]) for p in points if name in p["metrics"]]


def until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait for `condition`; the limit is for a machine that is busy with other things."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
