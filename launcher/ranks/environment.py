"""The rank environment: this process's place among the ranks, from environment variables of its launcher. No torch.

torchrun and the local launcher set RANK and WORLD_SIZE; `srun` sets SLURM_PROCID and related variables. Inside a
batch script or an `salloc` shell, but not under `srun`, Slurm's variables describe the job and not this process, so
they are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from biroute.configs.errors import UsageError
from biroute.launcher.attempts.journal import ATTEMPT_VARIABLE

RENDEZVOUS_FILE = "BIROUTE_RENDEZVOUS_FILE"
_FIRST_PORT, _PORTS = 20_000, 10_000  # below the ports that Linux gives to outgoing connections (32768 on)


@dataclass(frozen=True)
class RankEnvironment:
    """Rank among all processes and on this node, and their rendezvous: `address`:`port`, or else a file."""

    rank: int
    local_rank: int
    world_size: int
    address: str = ""
    port: int = 0
    file: str = ""
    port_of_ours: bool = False  # chosen here, so that the next attempt has another one


def started_by_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, the local launcher or srun started this process as one of its ranks."""
    # A single task of srun is an interactive shell or a run of one rank; the local launcher handles both.
    several = environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return "RANK" in environment or (several and _under_srun(environment))


def find_rank_environment(environment: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Read the rank environment from the variables.

    Raises:
        UsageError: a variable is missing, is not a number, or contradicts another.
    """
    if "RANK" not in environment and _under_srun(environment):
        return _slurm_rank_environment(environment)
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
    file = environment.get(RENDEZVOUS_FILE, "")
    if not file and "MASTER_ADDR" not in environment:
        raise UsageError("RANK is set but MASTER_ADDR is not; set MASTER_ADDR and MASTER_PORT, or unset RANK")
    if file:
        return _checked(RankEnvironment(rank, local_rank, world_size, file=file))
    port = _number(environment, "MASTER_PORT")
    return _checked(RankEnvironment(rank, local_rank, world_size, environment["MASTER_ADDR"], port))


def port_of_job(job: int, step: int = 0, attempt: int = 0) -> int:
    """Choose the rendezvous port of a job step; other jobs on the same node, and other attempts, get another one."""
    return _FIRST_PORT + (job + 1009 * step + 4001 * attempt) % _PORTS


def expand_nodes(text: str) -> list[str]:
    """Expand Slurm's list of nodes, such as `n[1-3,07-08],gpu5`, as `scontrol show hostnames` does.

    That command is not used because a container may lack it.

    Raises:
        UsageError: `text` is not such a list.
    """
    nodes = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text.strip()):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else _expand_ranges(ranges, text)
            expanded = [head + choice for head in expanded for choice in choices]
        nodes += expanded
    return nodes


def _under_srun(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment


def _slurm_rank_environment(environment: Mapping[str, str]) -> RankEnvironment:
    nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    address = environment.get("MASTER_ADDR") or (nodes[0] if nodes else "")
    if not address:
        raise UsageError("SLURM_PROCID is set but SLURM_STEP_NODELIST is not; start the ranks with srun, or set RANK")
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        attempt = _number(environment, ATTEMPT_VARIABLE) if ATTEMPT_VARIABLE in environment else 0
        port = port_of_job(_number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID"), attempt)
    place = RankEnvironment(
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        address,
        port,
        port_of_ours="MASTER_PORT" not in environment,
    )
    return _checked(place)


def _checked(environment: RankEnvironment) -> RankEnvironment:
    if not 0 <= environment.rank < environment.world_size:
        raise UsageError(
            f"rank {environment.rank} is not below the number of ranks, {environment.world_size}; ranks count from 0"
        )
    return environment


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UsageError(f"{name} is not set; start the ranks with biroute train, torchrun or srun, which set it")
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} is not a whole number")
    return int(text)


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UsageError(f"{text!r} is not a list of nodes as Slurm writes it, such as n[1-4]")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers
