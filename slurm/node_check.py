"""Checks of a single node, and a comparison of all nodes to find the bad ones. No torch, no network."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from biroute.configs.files import new_file
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import fencing_token_of
from biroute.launcher.attempts.run_files import FENCING_TOKEN

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece", "webdataset", "mlflow", "pydantic")
CLOCK_SECONDS = 5.0  # largest accepted difference between two clocks


@dataclass(frozen=True)
class Findings:
    """What a node reports about itself."""

    rank: int
    host: str
    facts: Mapping[str, str]  # what must be the same on all nodes
    cpus: int
    gpus: int
    problems: Sequence[str] = field(default=())  # faults of this node that need no comparison


def inspect_node(rank: int, host: str, run_dir: Path, attempt: int, config: RunConfig) -> Findings:
    """Check this node's interpreter, packages and devices, and whether it sees the right run folder."""
    cpus, gpus = _cpus(), _gpus()
    problems = [*_folder_problems(run_dir, attempt), *_device_problems(config, cpus, gpus)]
    return Findings(rank, host, _facts(), cpus, gpus, problems)


def judge(
    nodes: Sequence[str],
    findings: Sequence[Findings],
    reach: Mapping[int, str] | None = None,
    clocks: Mapping[int, float] | None = None,
) -> dict[str, list[str]]:
    """Find the bad nodes of a job.

    Args:
        nodes: names of all nodes, by rank.
        findings: reports of the nodes that answered rank 0 in time.
        reach: for each rank, the error of the all-reduce there, "" if it worked; None if it was not tried.
        clocks: for each rank, by how many seconds its clock is ahead of rank 0's.

    Returns:
        For each bad node, a list of its problems.
    """
    bad: dict[str, list[str]] = {}
    answered = {found.rank: found for found in findings}
    silent = [rank for rank in range(len(nodes)) if rank not in answered]
    if len(silent) == len(nodes) - 1 >= 2:
        bad[nodes[0]] = ["no other node reached it; is its network up, and network_interface right?"]
        silent = []
    for rank in silent:
        _add(bad, nodes[rank], f"no answer to {nodes[0]}: Python did not start there, or the network is down")
    for found in findings:
        for problem in found.problems:
            _add(bad, nodes[found.rank], problem)
    for rank, differences in _differences(findings).items():
        _add(bad, nodes[rank], differences)
    for rank, problem in _unreachable(reach or {}).items():
        _add(bad, nodes[rank], problem)
    for rank, seconds in _wrong_clocks(clocks or {}).items():
        direction = "ahead of" if seconds > 0 else "behind"
        _add(
            bad,
            nodes[rank],
            f"its clock is {abs(seconds):.0f} s {direction} the others'; set up time synchronisation",
        )
    return bad


def _add(bad: dict[str, list[str]], node: str, problem: str) -> None:
    bad.setdefault(node, []).append(problem)


def _facts() -> dict[str, str]:
    facts = {"python": platform.python_version(), "interpreter": sys.executable}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "missing"
    return facts


def _folder_problems(run_dir: Path, attempt: int) -> list[str]:
    """Check that this is the folder that the batch script uses, and that it is writable."""
    try:
        if not (run_dir / FENCING_TOKEN).exists():
            return [f"train.run_dir={run_dir} is not the shared folder there: it has no file {FENCING_TOKEN}"]
        if (seen := fencing_token_of(run_dir)) != attempt:
            return [f"train.run_dir={run_dir} is another folder there: its attempt is {seen}, not {attempt}"]
        trial = run_dir / f".preflight-{os.getpid()}-{platform.node()}"
        with new_file(trial) as file:
            file.write(b"written\n")
        trial.unlink()
    except OSError as error:
        return [f"train.run_dir={run_dir} can't be used there: {error.strerror}"]
    return []


def _device_problems(config: RunConfig, cpus: int, gpus: int) -> list[str]:
    ranks = config.slurm.ranks_per_node or 1
    if config.train.device == "cuda":
        return []  # the preflight asks torch, which knows what works
    if not gpus and cpus < 1:
        return [f"{cpus} CPUs for {ranks} ranks"]
    return []


def _cpus() -> int:
    """Return the number of CPUs that Slurm gave the job on this node, or that this process may use."""
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(given) if given.isdecimal() else len(os.sched_getaffinity(0))


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _differences(findings: Sequence[Findings]) -> dict[int, str]:
    """Return, for each rank that differs from most nodes (of two nodes, from rank 0), the facts that differ."""
    found: dict[int, list[str]] = {}
    devices = {item.rank: {"CPUs": str(item.cpus), "GPUs": str(item.gpus)} for item in findings}
    facts = {item.rank: {**item.facts, **devices[item.rank]} for item in sorted(findings, key=lambda item: item.rank)}
    for name in dict.fromkeys(name for of_rank in facts.values() for name in of_rank):
        values = {rank: of_rank.get(name, "missing") for rank, of_rank in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # in a tie the first one, which is rank 0's
        for rank, value in values.items():
            if value != usual:
                found.setdefault(rank, []).append(f"{name} {value}, the others have {usual}")
    return {rank: "; ".join(parts) for rank, parts in found.items()}


def _unreachable(reach: Mapping[int, str]) -> dict[int, str]:
    """Return the problem of each rank at fault; a time-out is not one if another rank failed and kept it waiting."""
    failed = {rank: error for rank, error in reach.items() if error}
    own = {rank: error for rank, error in failed.items() if "time" not in error.lower()}
    blamed = own or (failed if len(failed) < len(reach) else {rank: failed[rank] for rank in list(failed)[1:]})
    return {rank: f"a small all-reduce failed there: {error}" for rank, error in blamed.items()}


def _wrong_clocks(clocks: Mapping[int, float]) -> dict[int, float]:
    """Return, for each rank with a wrong clock, the seconds it is ahead of the median (of two, the lower rank's)."""
    if not clocks:
        return {}
    ordered = sorted(clocks.values())
    middle = ordered[len(ordered) // 2] if len(ordered) > 2 else clocks[min(clocks)]
    return {rank: ahead - middle for rank, ahead in clocks.items() if abs(ahead - middle) > CLOCK_SECONDS}
