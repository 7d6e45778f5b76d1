"""The check of nodes, with a real process for each: every kind of bad node is named, and no good one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from helpers.ports import claim_port

from biroute.launcher.attempts.failures import bad_nodes, explain_end
from biroute.launcher.attempts.journal import begin_attempt
from biroute.launcher.attempts.run_files import log_dir
from biroute.slurm.node_check import Findings, judge

Start = Callable[..., dict[int, tuple[int, str]]]
NODES = ("n1", "n2", "n3")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    begin_attempt(folder, nodes=NODES, world_size=3, job="7")
    return folder


@pytest.fixture
def start(run_dir: Path, tmp_path: Path) -> Start:
    """`start(nodes, environments=..., folders=..., absent=...)` -> rank -> (exit status, standard error)."""

    def check(
        number: int,
        *,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        folders: Mapping[int, Path] | None = None,
        absent: tuple[int, ...] = (),
        seconds: float = 120.0,
        device: str = "auto",
    ) -> dict[int, tuple[int, str]]:
        config = tmp_path / "config.yaml"
        config.write_text(
            yaml.safe_dump(
                {"slurm": {"preflight_timeout_seconds": seconds, "ranks_per_node": 2}, "train": {"device": device}}
            )
        )
        port = claim_port()
        processes = {}
        for rank in set(range(number)) - set(absent):
            slurm = {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_TASKS": str(number),
                "SLURM_STEP_NODELIST": f"n[1-{number}]",
                "SLURMD_NODENAME": NODES[rank],
                "SLURM_CPUS_ON_NODE": "4",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "BIROUTE_ATTEMPT": "1",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "biroute.slurm.preflight", (folders or {}).get(rank, run_dir), config],
                env={**os.environ, **slurm, **(environments or {}).get(rank, {})},
                stderr=subprocess.PIPE,
                text=True,
            )
        answers = {}
        for rank, process in processes.items():
            _, err = process.communicate(timeout=2 * seconds + 120)
            answers[rank] = (process.returncode, err)
        return answers

    return check


def test_good_nodes_and_two_bad_ones(start: Start, run_dir: Path, tmp_path: Path) -> None:
    assert {status for status, _ in start(3).values()} == {0}
    assert bad_nodes(log_dir(run_dir, 1)) == {}

    other_numpy = tmp_path / "packages" / "numpy-0.1.dist-info"
    other_numpy.mkdir(parents=True)
    (other_numpy / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    fast_clock = tmp_path / "clock"
    fast_clock.mkdir()
    (fast_clock / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 100\n")
    paths = {1: {"PYTHONPATH": str(other_numpy.parent)}, 2: {"PYTHONPATH": str(fast_clock)}}
    answers = start(3, environments=paths)
    assert {status for status, _ in answers.values()} == {1}, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert set(found) == {"n2", "n3"}, found
    assert "numpy 0.1, the others have" in found["n2"][0]
    assert "clock is 100 s ahead" in found["n3"][0]
    end = explain_end(log_dir(run_dir, 1), 1)
    assert end.excluded == ("n2", "n3")
    assert "node n2: numpy 0.1" in answers[0][1], "the first node's log names all"


def test_first_node_without_the_shared_folder(start: Start, run_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "not mounted"
    elsewhere.mkdir()
    answers = start(2, folders={0: elsewhere})
    assert {status for status, _ in answers.values()} == {1}, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert list(found) == ["n1"], found
    assert "is not the shared folder there" in found["n1"][0]
    assert list(elsewhere.iterdir()) == [], "nothing is written into what is not the run folder"


def test_a_node_with_the_wrong_network_interface(start: Start, run_dir: Path) -> None:
    answers = start(3, environments={1: {"GLOO_SOCKET_IFNAME": "nosuch0"}}, seconds=60.0)
    assert {status for status, _ in answers.values()} == {1}, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert list(found) == ["n2"], found
    assert "nosuch0" in found["n2"][0]


def test_nodes_where_torch_sees_no_gpu(start: Start, run_dir: Path) -> None:
    """A driver that is dead, or torch without CUDA: Slurm lists the GPUs all the same."""
    listed = {"CUDA_VISIBLE_DEVICES": "0,1"} if torch.version.cuda is None else {"CUDA_VISIBLE_DEVICES": ""}
    answers = start(2, device="cuda", environments={0: listed, 1: listed})
    assert {status for status, _ in answers.values()} == {1}, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert set(found) == {"n1", "n2"}
    assert all("sees 0 GPUs for 2 ranks" in problems[0] for problems in found.values()), found


def test_a_node_that_does_not_answer(start: Start, run_dir: Path) -> None:
    answers = start(2, absent=(1,), seconds=12.0)
    assert answers[0][0] == 1, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert list(found) == ["n2"], found
    assert "no answer to n1" in found["n2"][0]


def test_a_first_node_that_does_not_answer(start: Start, run_dir: Path) -> None:
    answers = start(2, absent=(0,), seconds=5.0)
    assert answers[1][0] == 1, answers
    found = bad_nodes(log_dir(run_dir, 1))
    assert list(found) == ["n1"], found
    assert "n2 could not reach it" in found["n1"][0]
    assert json.loads((log_dir(run_dir, 1) / "preflight" / "n2.json").read_text())["problems"] == []


def findings(rank: int, **facts: str) -> Findings:
    return Findings(rank, f"n{rank + 1}", facts or {"torch": "2"}, cpus=4, gpus=0)


@pytest.mark.parametrize(
    ("found", "reach", "clocks", "bad"),
    [
        ([0, 1, 2], {0: "", 1: "", 2: ""}, {0: 0.0, 1: 1.0, 2: -1.0}, set()),
        ([0, 1], None, None, {"n3"}),
        ([0], None, None, {"n1"}),
        ([0, 1, 2], {0: "timeout", 1: "no device", 2: "timed out"}, {}, {"n2"}),
        ([0, 1, 2], {0: "", 1: "timeout", 2: ""}, {}, {"n2"}),
        ([0, 1, 2], {0: "", 1: "", 2: ""}, {0: 0.0, 1: 60.0, 2: 60.0}, {"n1"}),
        ([0, 1, 2], {0: "", 1: "", 2: ""}, {0: 0.0, 1: -60.0, 2: 0.0}, {"n2"}),
    ],
)
def test_verdict(
    found: list[int], reach: dict[int, str] | None, clocks: dict[int, float] | None, bad: set[str]
) -> None:
    assert set(judge(NODES, [findings(rank) for rank in found], reach, clocks)) == bad


def test_verdict_of_two_nodes_that_differ() -> None:
    two = [findings(0, torch="2"), findings(1, torch="3")]
    assert judge(NODES[:2], two) == {"n2": ["torch 3, the others have 2"]}
