"""New processes as the ranks of a process group, for benchmarks that need real ones: what each reports comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from biroute.configs.schema import TrainConfig
from biroute.launcher.ranks.environment import RENDEZVOUS_FILE, find_rank_environment
from biroute.launcher.ranks.rendezvous import join_processes
from biroute.launcher.start.library_warnings import ignore_library_warnings
from biroute.parallel.mesh.megatron import prepare_megatron

CPU = torch.device("cpu")
Work = Callable[..., dict[str, Any]]


def reports_of_ranks(
    work: Work,
    arguments: Sequence[Any],
    ranks: int,
    train: TrainConfig | None = None,
    *,
    preload: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Call `work(*arguments)` in `ranks` new processes of one thread each, on the CPU, that form a process group.

    Args:
        work: a function of a module, whose result is JSON; it finds its rank in the process group.
        arguments: what it is called with; they are pickled.
        ranks: how many processes.
        train: for the timeouts of collectives.
        preload: modules that one process imports, of which each rank is then a fork; without any, each rank starts
            anew and imports what it needs.

    Returns:
        What each rank reports, by rank.

    Raises:
        torch.multiprocessing.ProcessException: a rank failed; the others were ended.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # some libraries warn when the ranks import them
    train = (train or TrainConfig()).model_copy(update={"threads_per_rank": 1})
    if preload:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    with tempfile.TemporaryDirectory(prefix="biroute-bench-") as folder:
        torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _rank, args=(ranks, work, tuple(arguments), train, Path(folder)), nprocs=ranks,
            start_method="forkserver" if preload else "spawn",
        )  # fmt: skip
        return [json.loads(_report(Path(folder), rank).read_text("utf-8")) for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Work, arguments: Sequence[Any], train: TrainConfig, folder: Path) -> None:
    ignore_library_warnings()
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_group(rank, ranks, folder, train)
    _report(folder, rank).write_text(json.dumps(work(*arguments)), "utf-8")
    dist.barrier()
    os._exit(0)  # an orderly end would wait for the threads of all groups


def _report(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def join_group(rank: int, ranks: int, folder: Path, train: TrainConfig, device: torch.device = CPU) -> None:
    """Make this process a rank on the device; the ranks meet in a file of `folder`. Collective.

    `train.device` does not count: "auto" would join by NCCL on a machine with a GPU, which is not for the CPU.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        RENDEZVOUS_FILE: str(folder / "rendezvous"),
    }
    prepare_megatron(device)
    join_processes(find_rank_environment(), train.model_copy(update={"device": device.type}))
