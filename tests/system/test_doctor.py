"""`biroute doctor`: on this machine, with things that are wrong, and as two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ports import claim_port

from biroute.launcher.doctor import device
from biroute.launcher.doctor.ranks import differences
from biroute.launcher.doctor.software import Check, version_checks

from .conftest import Answer

Command = Callable[..., Answer]


def found(answer: Answer) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(answer.out)}


def test_a_good_machine(command: Command, tmp_path: Path) -> None:
    answer = command("doctor", "--run-dir", tmp_path / "runs", CUDA_VISIBLE_DEVICES="")
    assert (answer.status, answer.err) == (0, "")
    assert "the same route as the reference" in answer.out
    assert "TFLOP/s" in answer.out
    assert metadata.version("torch") in answer.out
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_what_is_wrong_is_named_with_its_remedy(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = command("doctor", "--gpu", "--run-dir", tmp_path / "file" / "runs", "--json", CUDA_VISIBLE_DEVICES="")
    assert answer.status == 2
    checks = found(answer)
    assert "sees 0 GPUs for 1 ranks" in checks["GPUs"]["problem"]
    assert "choose another train.run_dir" in checks[f"run folder {tmp_path}/file/runs"]["problem"]
    lines = command("doctor", "--gpu", CUDA_VISIBLE_DEVICES="").out.splitlines()
    assert lines[-1].startswith("problem: GPUs: torch")


def test_two_ranks_and_one_that_differs(tmp_path: Path) -> None:
    other = tmp_path / "packages" / "numpy-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(claim_port())}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "biroute.launcher.cli.main", "doctor", "--json", "--run-dir", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            arguments,
            env={**os.environ, **variables, "RANK": str(rank)} | ({"PYTHONPATH": str(other.parent)} if rank else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [Answer(rank.wait(300), *rank.communicate()) for rank in ranks]
    assert [answer.status for answer in answers] == [2, 2], answers
    assert answers[1].out == "", "rank 0 speaks for all"
    checks = found(answers[0])
    assert "GB/s" in checks["all-reduce of 2 ranks"]["value"]
    assert checks["clocks"]["problem"] == ""
    assert "rank 1: 1.0" in checks["numpy on all ranks"]["problem"]
    (named,) = [name for name in checks if name.startswith("rank 1 on ")]
    assert named.endswith(", numpy")
    assert "BiRoute needs >=1.26" in checks[named]["problem"]


def test_wrong_attention_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right, cpu = device.bi_level_attention, torch.device("cpu")
    assert device.attention_check(cpu).problem == ""

    def wrong(*arguments: Any, **sizes: Any) -> torch.Tensor:
        return right(*arguments, **sizes) * 1.001

    monkeypatch.setattr(device, "bi_level_attention", wrong)
    assert "must equal the reference" in device.attention_check(cpu).problem

    def broken(*arguments: Any, **sizes: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(device, "bi_level_attention", broken)
    assert device.attention_check(cpu).problem == "RuntimeError: no kernel image is available"


def test_ranks_are_compared_with_most_others() -> None:
    ranks = [[Check("host", name), Check("torch", "2.13.0"), Check("GPUs", "8")] for name in ("a", "b", "c")]
    assert list(differences(ranks)) == []
    ranks[2][1] = Check("torch", "2.11.0")
    (one,) = differences(ranks)
    assert (one.name, one.value) == ("torch on all ranks", "2.13.0")
    assert one.problem == "rank 2: 2.11.0; make the nodes alike"


def test_every_installed_version_is_accepted() -> None:
    assert [check for check in version_checks() if check.problem] == []
