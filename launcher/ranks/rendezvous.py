"""Rendezvous of the ranks: device, process group, and the number of their attempt."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from biroute.configs.errors import UsageError
from biroute.configs.schema import TrainConfig
from biroute.launcher.attempts.failures import nccl_file_prefix
from biroute.launcher.attempts.journal import begin_attempt, given_attempt, make_run_dir
from biroute.launcher.attempts.run_files import log_dir
from biroute.launcher.ranks.environment import RankEnvironment
from biroute.launcher.ranks.secret import prove
from biroute.parallel.messages import broadcast_message, gather_messages

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun: its agent, not rank 0, holds the store
# NCCL's flight recorder: a default, and the names by which a user may have set it, the older one last.
_RECORDS = {
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",  # calls that it keeps
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
_RECORDS_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_NEVER = timedelta(days=365)
_SHORTEST_TIMEOUT = timedelta(minutes=30)  # of a collective; the watchdog ends a hang long before that


@dataclass(frozen=True)
class Place:
    """Rank among all processes, rank on this machine, number of processes, and device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join_processes(environment: RankEnvironment, train: TrainConfig, secret: bytes | None = None) -> Place:
    """Choose this rank's device and join the process group. Collective.

    With a `secret`, the ranks first prove to each other that they know it.

    Raises:
        UsageError: a GPU was requested and there is none, the address is unknown, the given port is in use, a rank
            does not know the secret, or it has a GPU where rank 0 has none or the other way round.
        RuntimeError: the port is in use, and was chosen for this attempt alone.
    """
    device = choose_device(train.device, environment.local_rank)
    # DeepSpeed reads these variables, and takes LOCAL_RANK for the number of the GPU.
    os.environ.update(
        RANK=str(environment.rank),
        LOCAL_RANK=str(environment.local_rank if device.index is None else device.index),
        WORLD_SIZE=str(environment.world_size),
    )
    if train.threads_per_rank:
        torch.set_num_threads(train.threads_per_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    record_collectives(backend, train.run_dir, given_attempt())
    _handshake(environment, backend, collective_timeout(train), secret)
    return Place(environment.rank, environment.local_rank, environment.world_size, device)


def collective_timeout(train: TrainConfig) -> timedelta:
    """Return the timeout of collectives, for every group: above the watchdog's, which names the missing rank."""
    if train.hang_seconds == 0:  # nothing is to end a hang
        return _NEVER
    return max(_SHORTEST_TIMEOUT, 2 * timedelta(seconds=max(train.hang_seconds, train.startup_seconds)))


def begin_joint_attempt(run_dir: Path, world_size: int) -> int:
    """Take over the run folder on rank 0, for ranks that another launcher started. Collective.

    Returns:
        The number of the attempt.

    Raises:
        UsageError: the folder cannot be written; raised on all ranks.
    """
    nodes = list(dict.fromkeys(gather_messages(socket.gethostname())))
    answer: int | str = ""
    if dist.get_rank() == 0:
        try:
            make_run_dir(run_dir)
            job = os.environ.get("SLURM_JOB_ID")
            answer = begin_attempt(run_dir, nodes=nodes, world_size=world_size, job=job)
        except UsageError as error:
            answer = str(error)
    answer = broadcast_message(answer)
    if isinstance(answer, str):
        raise UsageError(answer)
    record_collectives(dist.get_backend(), run_dir, answer)
    return answer


def record_collectives(backend: str, run_dir: Path, attempt: int | None) -> None:
    """Have NCCL keep its last calls and, where one times out, write them into the attempt's logs.

    Call it before the group is made; if the attempt gets its number only then, again for the file, whose name torch
    looks up when it writes. What the user has set stays.
    """
    if backend != "nccl":
        return
    defaults = dict(_RECORDS)
    if attempt is not None:
        defaults[_RECORDS_FILE] = nccl_file_prefix(log_dir(run_dir, attempt))
    for names, value in defaults.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def leave_processes(backend: str, close: Callable[[], None], seconds: float = 30.0) -> bool:
    """Close NCCL's communicators at the end of a run, so that a rank that ends first does not fail the others.

    Closing waits for the other ranks, one of which may hang by now. gloo needs none of that.

    Args:
        backend: of the process group.
        close: `dist.destroy_process_group`.
        seconds: to wait at most.

    Returns:
        Whether nothing is left open.
    """
    if backend != "nccl":
        return True
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(seconds)
    return not closing.is_alive()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Choose the device of a rank, and make it the current one.

    Raises:
        UsageError: CUDA is wanted and torch sees no GPU, or there are more ranks than GPUs.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device=cuda: torch sees no GPU here; use train.device=auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    index = gpu_of_rank(local_rank, torch.cuda.device_count(), os.environ)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_of_rank(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """Choose the GPU of a rank among the `visible` ones.

    srun's `--gpus-per-task=1` and `--gpu-bind=single:1` show each rank only its own GPU, which then is number 0.

    Raises:
        UsageError: there are more ranks than GPUs.
    """
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    by_srun = "SLURM_PROCID" in environment and "RANK" not in environment  # torchrun inside a step sets RANK
    if by_srun and visible == 1 and on_node.isdecimal() and int(on_node) > local_rank:
        return 0
    if local_rank >= visible:
        raise UsageError(f"local rank {local_rank} has no GPU: torch sees {visible}; start one process per GPU")
    return local_rank


def port_in_use(error: Exception) -> bool:
    """Return whether a store could not be opened because another process listens on its port."""
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()


def _handshake(environment: RankEnvironment, backend: str, timeout: timedelta, secret: bytes | None) -> None:
    address = f"{environment.address}:{environment.port}"
    os.environ.update(
        {"MASTER_ADDR": environment.address, "MASTER_PORT": str(environment.port)} if environment.address else {}
    )
    try:
        store = _store(environment, timeout)
        if secret is not None:
            prove(store, secret, environment.rank, environment.world_size)
        check_backend(store, environment.rank, backend)
        dist.init_process_group(
            backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
        # For groups that DeepSpeed creates without a timeout; the defaults are ten minutes with NCCL, 30 with gloo.
        dist.distributed_c10d.default_pg_nccl_timeout = dist.distributed_c10d.default_pg_timeout = timeout
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = "is in use" if port_in_use(error) else str(error)
        if environment.port_of_ours:
            raise RuntimeError(f"rendezvous at {address}: {reason}; the next attempt uses another port") from error
        raise UsageError(f"rendezvous at MASTER_ADDR:MASTER_PORT = {address}: {reason}; use another port") from None


def check_backend(store: dist.Store, rank: int, backend: str) -> None:
    """Check that this rank communicates as rank 0 does; otherwise both would wait for each other until the timeout.

    Raises:
        UsageError: one of them has a GPU and the other has none.
    """
    key, devices = "biroute/backend", {"nccl": "a GPU", "gloo": "the CPU"}
    if rank == 0:
        store.set(key, backend)
        return
    other = store.get(key).decode()
    if other != backend:
        raise UsageError(
            f"rank {rank} on {socket.gethostname()} would train on {devices[backend]}, rank 0 on {devices[other]}: "
            "with train.device=auto all nodes need working GPUs, or none: biroute doctor --gpu tells what is wrong, "
            "or set train.device=cpu"
        )


def _store(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    """Meet the other ranks; returns what they find each other's addresses in."""
    rank, world_size = environment.rank, environment.world_size
    if environment.file:
        # A path, not a URL, in which some characters mean something else.
        return dist.FileStore(str(Path(environment.file).resolve()), world_size)
    listener = _listen(environment) if rank == 0 and os.environ.get(_AGENT_STORE) != "True" else None
    if listener is None:
        store: dist.Store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
        return store
    return dist.TCPStore(
        environment.address, environment.port, world_size, is_master=True, timeout=timeout,
        multi_tenant=True, master_listen_fd=listener.detach(),
    )  # fmt: skip


def _listen(environment: RankEnvironment) -> socket.socket | None:
    """Listen on the given address alone, where torch would listen on all networks.

    Returns:
        None for a host name: its own machine may know it as 127.0.1.1, by which no other machine reaches it.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if environment.address == "localhost" else environment.address)
    except ValueError:
        return None
    listener = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), environment.port))
    except OSError as error:
        listener.close()
        raise dist.DistNetworkError(error.strerror) from None
    listener.listen(environment.world_size)
    return listener
