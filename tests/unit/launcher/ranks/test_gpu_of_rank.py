"""Which GPU a rank takes: a pure function of what it sees, so that it needs no GPU."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from biroute.configs.errors import UsageError
from biroute.launcher.ranks.rendezvous import check_backend, gpu_of_rank

STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    ("local_rank", "visible", "environment", "index"),
    [
        (0, 8, {}, 0),
        (5, 8, {}, 5),
        (3, 4, STEP, 3),  # every rank sees all GPUs of the node
        (3, 1, STEP, 0),  # --gpus-per-task=1: each sees its own
        (0, 1, STEP, 0),
    ],
)
def test_the_gpu_of_a_rank(local_rank: int, visible: int, environment: dict[str, str], index: int) -> None:
    assert gpu_of_rank(local_rank, visible, environment) == index


@pytest.mark.parametrize(
    ("local_rank", "visible", "environment"),
    [
        (1, 1, {}),  # two ranks of torchrun on one GPU
        (4, 4, STEP),
        (1, 1, STEP | {"SLURM_GPUS_ON_NODE": "1"}),  # two tasks on a node with one GPU
        (3, 1, {"SLURM_GPUS_ON_NODE": "4"}),  # torchrun in a batch script, not bound by srun
        (3, 1, STEP | {"RANK": "3"}),  # torchrun in a step
        (3, 1, STEP | {"SLURM_GPUS_ON_NODE": ""}),
    ],
)
def test_more_ranks_than_gpus_are_refused(local_rank: int, visible: int, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"local rank {local_rank} has no GPU: torch sees {visible}"):
        gpu_of_rank(local_rank, visible, environment)


def test_a_rank_without_a_gpu_among_ranks_with_one_is_named() -> None:
    """gloo and NCCL would wait for each other."""
    store = dist.HashStore()
    check_backend(store, 0, "nccl")
    check_backend(store, 1, "nccl")
    with pytest.raises(UsageError, match="would train on the CPU, rank 0 on a GPU: with train"):
        check_backend(store, 2, "gloo")
