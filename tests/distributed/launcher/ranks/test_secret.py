"""Only ranks that know the run's secret may join, and nothing that they send can run code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.pool import WorkerPool
from helpers.ports import claim_port

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.run_files import SECRET
from biroute.launcher.ranks.secret import run_secret

Ranks = Callable[[int], WorkerPool]

JOIN = """
import sys
from pathlib import Path
import torch.distributed as dist
from biroute.configs.errors import UsageError
from biroute.configs.schema import TrainConfig
from biroute.launcher.ranks.environment import find_rank_environment
from biroute.launcher.ranks.rendezvous import join_processes
from biroute.launcher.ranks.secret import run_secret
from biroute.parallel.messages import gather_messages

try:
    join_processes(find_rank_environment(), TrainConfig(device="cpu"), run_secret(Path(sys.argv[1])))
    print(gather_messages(dist.get_rank()))
    dist.barrier()
    dist.destroy_process_group()
except UsageError as error:
    print(error)
"""


def join(rank: int, port: int, run_dir: Path, world_size: int = 2) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen([sys.executable, "-c", JOIN, str(run_dir)], env=environment, stdout=-1, text=True)


@pytest.mark.parametrize("stranger", [0, 1])
def test_a_rank_of_another_run_is_refused(tmp_path: Path, stranger: int) -> None:
    """The stranger is there first; it knows another secret, as it cannot read ours."""
    port = claim_port()
    processes = []
    for rank in (0, 1, 2):
        processes.append(join(rank, port, tmp_path / ("theirs" if rank == stranger else "ours"), world_size=3))
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    if stranger == 0:  # it refuses both, as they do not know its secret; nobody joins it
        assert "rank 1 does not know the secret" in answers[0]
        assert not any(answer.startswith("[") for answer in answers)
    else:
        assert answers[0].startswith("rank 1 does not know the secret of this run; its train.run_dir is another")
        assert not answers[1].startswith("["), "the stranger may see no more than that rank 0 has gone"
        assert "rank 0 does not start" in answers[2]


def impostor_job(folder: str) -> str:
    """Rank 0 answers without knowing the secret, as a stranger would who has taken the port."""
    import torch.distributed as dist

    from biroute.launcher.ranks.secret import prove

    store = dist.FileStore(f"{folder}/store", 2)
    if dist.get_rank() == 0:
        store.set("biroute/nonce/0", "0" * 32)
        store.set("biroute/answer/1", "0" * 64)
        return "done"
    try:
        prove(store, b"our secret", 1, 2)
    except UsageError as error:
        return str(error)
    return "joined a stranger"


def test_a_stranger_as_rank_0_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(impostor_job, str(tmp_path))[1].startswith("rank 0 does not know the secret of this run")


def test_the_store_listens_on_the_given_address_alone(tmp_path: Path) -> None:
    port = claim_port()
    first = join(0, port, tmp_path / "run")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=1)
    finally:
        first.kill()
        first.communicate()


def test_the_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    secret = run_secret(tmp_path / "run")
    assert len(secret) == 64 and secret != run_secret(tmp_path / "other")
    assert run_secret(tmp_path / "run") == secret
    path = tmp_path / "run" / SECRET
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(UsageError, match="not a file that only you can read; remove it"):
        run_secret(tmp_path / "run")
    path.unlink()
    path.symlink_to(tmp_path / "other" / SECRET)
    with pytest.raises(UsageError, match=SECRET):
        run_secret(tmp_path / "run")


MESSAGES: list[Any] = [None, 1.5, "text \u2581", [1, [2, "x"]], {"a": {"b": None}}, list(range(5000)), ""]


def messages_job() -> list[Any]:
    import torch.distributed as dist

    from biroute.parallel.messages import broadcast_message, gather_messages

    own = MESSAGES[dist.get_rank() :]  # of other lengths on each rank
    return [gather_messages(own), [broadcast_message(message) for message in MESSAGES]]


def test_messages_arrive_as_they_were(ranks: Ranks) -> None:
    for gathered, broadcast in ranks(3).run(messages_job):
        assert gathered == [MESSAGES, MESSAGES[1:], MESSAGES[2:]]
        assert broadcast == MESSAGES
