"""Whole runs on GPUs, beside the same runs on the CPU. `make gpu-check` calls them where there is a GPU.

`BIROUTE_TEST_DEVICE=cpu` in the environment tries the tests themselves without one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.corpus import small_run
from helpers.job import points_of

from .conftest import Answer

Command = Callable[..., Answer]
DEVICE = os.environ.get("BIROUTE_TEST_DEVICE", "")
if not DEVICE:
    pytest.skip("for `make gpu-check`, on a machine with a GPU", allow_module_level=True)
STEPS = 4
MODEL = {
    "hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 32,
    "sequence_length": 256, "qk_norm": True, "attention": {"region_size": 16, "topk": 4},
}  # fmt: skip
LAYOUTS: list[dict[str, Any]] = [
    {"data": 1},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"region": 2},
    {"data": 2, "zero_stage": 2, "overlap_grad_reduce": True},
    {"data": 2, "zero_stage": 3},
]


def ranks_of(layout: dict[str, Any]) -> int:
    return max(layout.get(axis, 1) for axis in ("tensor", "pipeline", "region", "data"))


def gpus() -> int:
    return torch.cuda.device_count() if DEVICE == "cuda" else 2


def run_file(corpus: Path, run_dir: Path, device: str, precision: str, layout: dict[str, Any]) -> Path:
    tree = small_run(corpus, run_dir, steps=STEPS, parallel=layout)
    tree["model"] = MODEL
    tree["train"] |= {"device": device, "precision": precision, "log_every": 1}
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(command: Command, file: Path, ranks: int) -> None:
    done = command("train", file, "--processes", ranks)
    assert done.status == 0, done.err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_trains_as_on_the_cpu(
    command: Command, corpus: Path, tmp_path: Path, layout: dict[str, Any], precision: str
) -> None:
    ranks = ranks_of(layout)
    if ranks > gpus():
        pytest.skip(f"{ranks} ranks need as many GPUs")
    losses = []
    for name, device in (("here", "cpu"), ("there", DEVICE)):
        run_dir = tmp_path / name
        train(command, run_file(corpus, run_dir, device, precision, layout), ranks)
        losses.append([loss for _, loss in points_of(run_dir)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == "fp32" else 2e-2)


def test_a_run_resumes_and_is_used(command: Command, corpus: Path, tmp_path: Path) -> None:
    """A resumed run goes on within rounding, its memory is measured, and what it trained generates and evaluates."""
    run_dir = tmp_path / "run"
    file = run_file(corpus, run_dir, DEVICE, "bf16", {"data": 1})
    train(command, file, 1)
    straight = points_of(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    train(command, file, 1)
    resumed = points_of(run_dir)
    assert [step for step, _ in resumed] == [step for step, _ in straight] == [1, 2, 3, 4]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in straight], rel=1e-2)
    peaks = [peak for _, peak in points_of(run_dir, "memory/peak_gib")]
    assert len(peaks) == STEPS and min(peaks) > 0
    if DEVICE == "cuda":
        reserved = [most for _, most in points_of(run_dir, "memory/reserved_gib")]
        assert all(most >= peak for most, peak in zip(reserved, peaks, strict=True))
    for arguments in (("generate", run_dir, "--prompt", "Return", "--max-tokens", "8"), ("evaluate", run_dir)):
        done = command(*arguments)
        assert done.status == 0, done.err
