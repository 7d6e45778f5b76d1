"""What torch is told of NCCL's last calls: where they go, and that a user's own words stay."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from biroute.configs.schema import TrainConfig
from biroute.launcher.attempts.journal import ATTEMPT_VARIABLE
from biroute.launcher.ranks import rendezvous
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.ranks.rendezvous import join_processes, record_collectives

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
)


@pytest.fixture(autouse=True)
def nothing_set() -> Iterator[None]:
    before = dict(os.environ)
    for name in (*NAMES, ATTEMPT_VARIABLE):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def what_is_set() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_nccl_keeps_its_last_calls_and_writes_them_into_the_logs(tmp_path: Path) -> None:
    record_collectives("nccl", tmp_path, None)
    told = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert what_is_set() == told
    record_collectives("nccl", tmp_path, 3)  # torch appends the rank
    assert what_is_set() == told | {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/logs/attempt-0003/nccl-rank-"}


def test_gloo_has_no_such_thing(tmp_path: Path) -> None:
    record_collectives("gloo", tmp_path, 3)
    assert what_is_set() == {}


def test_what_a_user_set_stays_under_either_name(tmp_path: Path) -> None:
    given = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/trace",
    }
    os.environ.update(given)
    record_collectives("nccl", tmp_path, 3)
    assert what_is_set() == given


def test_torch_still_knows_the_names() -> None:
    import torch

    folder = Path(torch.__file__).parent
    headers = folder / "include/torch/csrc/distributed/c10d"
    text = "".join((headers / name).read_text() for name in ("FlightRecorder.hpp", "ProcessGroupNCCL.hpp"))
    assert all(f'"{name}"' in text for name in NAMES[:3])
    with (
        (folder / "lib/libtorch_cpu.so").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        assert all(library.find(name.encode()) >= 0 for name in NAMES[3:])


def test_they_are_set_before_the_group_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU: everything up to the group, which is not made."""
    import torch

    seen = {}
    monkeypatch.setattr(rendezvous, "choose_device", lambda wanted, rank: torch.device("cuda", 0))
    monkeypatch.setattr(rendezvous, "_handshake", lambda *arguments: seen.update(what_is_set()))
    os.environ[ATTEMPT_VARIABLE] = "2"
    environment = RankEnvironment(0, 0, 1, file=str(tmp_path / "store"))
    join_processes(environment, TrainConfig(run_dir=tmp_path / "run"))
    assert seen == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/run/logs/attempt-0002/nccl-rank-",
    }


def test_an_attempt_that_the_ranks_begin_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is known only after the group is made; torch looks for the file's name when it writes it."""
    monkeypatch.setattr(rendezvous, "gather_messages", lambda message: [message])
    monkeypatch.setattr(rendezvous, "broadcast_message", lambda message: message)
    monkeypatch.setattr(rendezvous.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(rendezvous.dist, "get_backend", lambda: "nccl")
    assert rendezvous.begin_joint_attempt(tmp_path / "run", 1) == 1
    assert what_is_set()["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/logs/attempt-0001/nccl-rank-"
