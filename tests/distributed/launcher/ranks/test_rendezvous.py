"""A rank that joins: its threads, its device, and how long its groups wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOIN = """
import sys, torch
from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.ranks.rendezvous import join_processes

train = config_from_tree({"train": {"threads_per_rank": int(sys.argv[2]), "device": sys.argv[3]}}, "test").train
try:
    print(join_processes(RankEnvironment(0, 0, 1, file=sys.argv[1]), train).device, torch.get_num_threads())
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("threads", "device", "answer"),
    [
        (3, "cpu", "cpu 3"),
        (0, "auto", "cpu 2"),
        (1, "cuda", "train.device=cuda: torch sees no GPU here; use train.device=auto or cpu"),
    ],
)
def test_a_rank_has_the_threads_and_the_device_of_its_settings(
    tmp_path: Path, threads: int, device: str, answer: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, str(tmp_path / "meeting"), str(threads), device],
        env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == answer, done.stderr


TIMEOUTS = """
import sys, torch, torch.distributed as dist
from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.ranks.rendezvous import collective_timeout, join_processes
from biroute.parallel.mesh.mesh import build_mesh

config = config_from_tree({"train": {"hang_seconds": 7200}}, "test")
place = join_processes(RankEnvironment(0, 0, 1, file=sys.argv[1]), config.train)
groups = build_mesh(resolve_layout(config, 1), collective_timeout(config.train)).groups
import deepspeed
deepspeed.init_distributed(dist_init_required=False)
made_by_deepspeed = deepspeed.comm.new_group([0])
for group in (dist.group.WORLD, groups.tp, groups.cp, groups.dp, groups.dp_cp, groups.pp, made_by_deepspeed):
    print(group._get_backend(place.device).options._timeout.total_seconds())
print(dist.distributed_c10d._get_default_timeout(dist.Backend.NCCL).total_seconds())
"""


def test_every_group_waits_longer_than_a_hang(tmp_path: Path) -> None:
    """Otherwise it ends the run before the watchdog can name the rank that is missing, or where nothing should."""
    done = subprocess.run(
        [sys.executable, "-c", TIMEOUTS, str(tmp_path / "meeting")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    seconds = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert seconds == ["14400.0"] * 8, done.stdout + done.stderr
