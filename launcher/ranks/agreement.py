"""Do all ranks run the same? Ranks that were started by hand, or on nodes with different copies, may not."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from biroute.configs.code_folders import PARTS, code_folder
from biroute.configs.errors import UsageError
from biroute.configs.load import flatten
from biroute.configs.messages import without_password
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.run_files import SUBMISSION
from biroute.parallel.messages import gather_messages

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece", "triton")
_CODE = [part for part in PARTS if part != "slurm"]  # what a rank may import
_SHOWN = 3  # differences in the message
# A dataset may lie in another folder on each node; its manifest's checksum is compared instead.
_OF_A_NODE = ("data.dir",)


def check_same(facts: Mapping[str, str]) -> None:
    """Compare `facts` (what, such as a field of the configuration -> value) of all ranks. Collective.

    Raises:
        UsageError: a rank has another value than rank 0, or lacks it; raised on all ranks with the rank, its node and
            the values.
    """
    everyone: list[tuple[str, dict[str, str]]] = gather_messages((socket.gethostname(), dict(facts)))
    host, expected = everyone[0]
    for rank, (node, found) in enumerate(everyone):
        differing = [name for name in sorted({*expected, *found}) if found.get(name) != expected.get(name)]
        if differing:
            there = ", ".join(f"{name}={found.get(name, 'nothing')}" for name in differing[:_SHOWN])
            here = ", ".join(f"{name}={expected.get(name, 'nothing')}" for name in differing[:_SHOWN])
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise UsageError(
                f"the ranks differ: rank {rank} on {node} has {there}{more}, but rank 0 on {host} has {here}; start "
                "all ranks with one configuration, one copy of the code and one environment"
            )


def check_submission(config_path: Path, config: RunConfig, world_size: int) -> None:
    """If this is a rank of a submitted run, check that it runs the frozen code, with as many ranks as were asked for.

    Raises:
        UsageError: another copy of BiRoute is imported, or an option of the job changed the number of ranks.
    """
    if config_path.parent != config.train.run_dir / SUBMISSION:
        return
    frozen = config_path.parent / "code" / "biroute"
    own = code_folder("configs").parent
    if frozen.is_dir() and not own.samefile(frozen):
        raise UsageError(
            f"this rank runs the code in {own}, and not what was submitted, {frozen}; look at PYTHONPATH in the "
            "profile's environment and setup"
        )
    slurm = config.slurm
    if slurm.ranks_per_node and world_size != slurm.nodes * slurm.ranks_per_node:
        raise UsageError(
            f"{world_size} ranks were started, not slurm.nodes x slurm.ranks_per_node = {slurm.nodes} x "
            f"{slurm.ranks_per_node}; look at the profile's options and at the variables SBATCH_* of your shell"
        )


def run_facts(config: RunConfig) -> dict[str, str]:
    """Return what must be the same on all ranks before they build anything: configuration, code and versions."""
    facts = {name: without_password(value) for name, value in flatten(config).items() if name not in _OF_A_NODE}
    for package in _PACKAGES:
        try:
            facts[f"version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:  # Triton is not everywhere
            facts[f"version of {package}"] = "none"
    return facts | {"checksum of BiRoute's code": code_checksum()}


def code_checksum() -> str:
    """Return a hash of all modules that a rank may import from BiRoute."""
    digest = hashlib.sha256()
    for part in _CODE:
        folder = code_folder(part)
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{part}/{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
