"""What is wrong with the GPUs of a node, from what torch says of them: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from biroute.launcher.ranks import gpu_check
from biroute.launcher.ranks.gpu_check import gpu_problems


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs; the product runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_check, "c_compiler", lambda: "/usr/bin/cc")
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda size, device: eye(size))


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_problems(2) == []
    (few,) = gpu_problems(3)
    assert "sees 2 GPUs for 3 ranks" in few

    def broken(size: int, device: str) -> torch.Tensor:
        if device == "cuda:0":
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")
        return torch.zeros(size, size)

    monkeypatch.setattr(torch, "eye", broken)
    monkeypatch.setattr(gpu_check, "c_compiler", lambda: None)
    raised, wrong, compiler = gpu_problems(2)
    assert raised == "GPU 0: CUDA error: uncorrectable ECC error encountered"
    assert wrong == "GPU 1: a matrix product gives 0.0, not 64"
    assert "no C compiler" in compiler
