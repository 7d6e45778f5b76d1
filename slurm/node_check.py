"""What one node finds out about itself, and which nodes of a job are bad by comparison. No torch, no network."""

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

from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import fencing_token_of
from biroute.launcher.attempts.run_files import FENCING_TOKEN

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece", "webdataset", "mlflow", "pydantic")
CLOCK_SECONDS = 5.0  # two clocks may differ by this much


@dataclass(frozen=True)
class Findings:
    """One node as it sees itself."""

    rank: int
    host: str
    facts: Mapping[str, str]  # what must be the same on all nodes
    cpus: int
    gpus: int
    problems: Sequence[str] = field(default=())  # what is wrong here, whatever the others have


def inspect_node(rank: int, host: str, run_dir: Path, attempt: int, config: RunConfig) -> Findings:
    """This node's interpreter, packages, devices, and its view of the run folder."""
    cpus, gpus = _cpus(), _gpus()
    problems = [*_folder_problems(run_dir, attempt), *_device_problems(config, cpus, gpus)]
    return Findings(rank, host, _facts(), cpus, gpus, problems)


def judge(
    nodes: Sequence[str],
    findings: Sequence[Findings],
    reach: Mapping[int, str] | None = None,
    clocks: Mapping[int, float] | None = None,
) -> dict[str, list[str]]:
    """Bad nodes and what is wrong with each.

    Args:
        nodes: names of all nodes, by rank.
        findings: of the nodes that answered rank 0 in time.
        reach: rank -> error of the all-reduce there, "" if it worked; None: it was not tried.
        clocks: rank -> seconds that its clock is ahead of rank 0's.
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
    """Is this the same folder as that of the batch script, and can it be written?"""
    try:
        if not (run_dir / FENCING_TOKEN).exists():
            return [f"train.run_dir={run_dir} is not the shared folder there: it has no file {FENCING_TOKEN}"]
        if (seen := fencing_token_of(run_dir)) != attempt:
            return [f"train.run_dir={run_dir} is another folder there: its attempt is {seen}, not {attempt}"]
        trial = run_dir / f".preflight-{os.getpid()}-{platform.node()}"
        trial.write_text("written\n")
        trial.unlink()
    except OSError as error:
        return [f"train.run_dir={run_dir} can't be used there: {error.strerror}"]
    return []


def _device_problems(config: RunConfig, cpus: int, gpus: int) -> list[str]:
    ranks = config.slurm.ranks_per_node or 1
    if config.train.device == "cuda" and gpus < ranks:
        return [f"{gpus} GPUs for {ranks} ranks"]
    if not gpus and cpus < 1:
        return [f"{cpus} CPUs for {ranks} ranks"]
    return []


def _cpus() -> int:
    """CPUs that Slurm gave the job there, or that this process may use."""
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
    """Rank -> facts in which it differs from most nodes, or from rank 0 where there are two."""
    found: dict[int, list[str]] = {}
    devices = {item.rank: {"CPUs": str(item.cpus), "GPUs": str(item.gpus)} for item in findings}
    facts = {item.rank: {**item.facts, **devices[item.rank]} for item in sorted(findings, key=lambda item: item.rank)}
    for name in dict.fromkeys(name for of_rank in facts.values() for name in of_rank):
        values = {rank: of_rank.get(name, "missing") for rank, of_rank in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equally many the first, which is rank 0's
        for rank, value in values.items():
            if value != usual:
                found.setdefault(rank, []).append(f"{name} {value}, the others have {usual}")
    return {rank: "; ".join(parts) for rank, parts in found.items()}


def _unreachable(reach: Mapping[int, str]) -> dict[int, str]:
    """Rank -> problem. A node with an error of its own keeps the others waiting: their time-outs are no fault."""
    failed = {rank: error for rank, error in reach.items() if error}
    own = {rank: error for rank, error in failed.items() if "time" not in error.lower()}
    blamed = own or (failed if len(failed) < len(reach) else {rank: failed[rank] for rank in list(failed)[1:]})
    return {rank: f"a small all-reduce failed there: {error}" for rank, error in blamed.items()}


def _wrong_clocks(clocks: Mapping[int, float]) -> dict[int, float]:
    """Rank -> seconds ahead of the middle clock (of two, of the lower rank's)."""
    if not clocks:
        return {}
    ordered = sorted(clocks.values())
    middle = ordered[len(ordered) // 2] if len(ordered) > 2 else clocks[min(clocks)]
    return {rank: ahead - middle for rank, ahead in clocks.items() if abs(ahead - middle) > CLOCK_SECONDS}
