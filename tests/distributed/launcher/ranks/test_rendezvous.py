"""A rank that joins: its threads and its device."""

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
