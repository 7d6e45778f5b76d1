"""Cluster profiles: settings of a whole cluster, in a YAML file that its users share. No torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from pydantic import Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from biroute.configs.errors import UsageError
from biroute.configs.load import explain_problems, parse_yaml
from biroute.configs.section import Section
from biroute.configs.slurm_section import SlurmTime

SHIPPED, SHIPPED_HARDWARE = "profiles", "hardware"
# Options of sbatch that have a field of their own; and those that the ranks and the record of attempts depend on.
_FIELD_OF_OPTION = {
    "account": "account", "partition": "partition", "qos": "qos", "constraint": "constraint",
    "reservation": "reservation", "mem": "memory_per_node", "time": "time_limit", "exclusive": "exclusive",
    "nodes": "slurm.nodes", "ntasks-per-node": "slurm.ranks_per_node", "cpus-per-task": "cpus_per_rank",
    "gpus-per-node": "gpus_per_node", "signal": "slurm.signal_seconds", "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue", "job-name": "train.run_dir",
}  # fmt: skip
_SIZES = ("ntasks", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket")
_OWN_OPTIONS = {
    "sbatch_options": (
        *_SIZES, "array", "chdir", "output", "error", "open-mode", "export", "export-file", "wait", "parsable",
        "test-only", "wrap", "no-kill",
    ),
    "srun_options": (
        *_SIZES, "nodes", "ntasks-per-node", "cpus-per-task", "output", "error", "open-mode", "export", "export-file",
        "wait", "kill-on-bad-exit", "multi-prog", "pty", "label", "time",
    ),
}  # fmt: skip


class ClusterProfile(Section):
    """How jobs of one cluster are requested and set up. Every field is optional."""

    account: str | None = Field(None, description="account to charge")
    partition: str | None = Field(None, description="partition, or several with commas; empty: the default one")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that nodes must have, as sbatch takes them")
    reservation: str | None = Field(None, description="reservation to use")
    time_limit: SlurmTime | None = Field(
        None, description="time limit of a job: 24:00:00, 2-0, or minutes; slurm.time_limit overrides it"
    )
    gpus_per_node: int = Field(
        0, ge=0, description="GPUs per node; also the ranks per node, unless slurm.ranks_per_node is set"
    )
    gpu_type: str | None = Field(None, description="type of GPU, by its Slurm name")
    cpus_per_rank: PositiveInt = Field(1, description="CPUs per rank; also its OMP_NUM_THREADS")
    memory_per_node: str | None = Field(None, description="memory of each node, such as 500G; 0: all of it")
    exclusive: bool = Field(False, description="reserve whole nodes, shared with no other job")
    sbatch_options: tuple[str, ...] = Field((), description="more options for sbatch, each --name or --name=value")
    srun_options: tuple[str, ...] = Field((), description="more options for the srun that starts the ranks")
    setup: tuple[str, ...] = Field((), description="lines of bash to run first, such as module load cuda")
    venv: Path | None = Field(None, description="folder of a virtual environment that every node can read")
    container: tuple[str, ...] = Field(
        (), description="words before python, such as [apptainer, exec, --nv, image.sif]; pyxis: see srun_options"
    )
    python: str | None = Field(
        None, description="interpreter; empty: python of venv, python3 in a container, or the one that submits"
    )
    environment: dict[str, str] = Field({}, description="environment variables of the job")
    network_interface: str | None = Field(None, description="GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME of the ranks")
    hardware: str | None = Field(
        None,
        description="hardware profile of the nodes, for predictions: the name of a shipped one, or a YAML file, from "
        "this file's folder on; empty: nothing is predicted",
    )

    @field_validator("setup", mode="before")
    @classmethod
    def _lines_of_setup(cls, setup: object) -> object:
        return tuple(setup.splitlines()) if isinstance(setup, str) else setup  # a block of YAML, `setup: |`

    @field_validator("sbatch_options", "srun_options", "container", mode="before")
    @classmethod
    def _one_word(cls, words: object) -> object:
        return (words,) if isinstance(words, str) else words

    @field_validator("memory_per_node", mode="before")
    @classmethod
    def _memory_as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value

    @field_validator("sbatch_options", "srun_options")
    @classmethod
    def _check_options(cls, options: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for option in options:
            name = option.removeprefix("--").partition("=")[0]
            if not option.startswith("--") or not name:
                raise ValueError(f"{option!r} is not of the form --name or --name=value")
            if info.field_name == "sbatch_options" and name in _FIELD_OF_OPTION:
                raise ValueError(f"{option!r} is what {_FIELD_OF_OPTION[name]} is for; set that")
            if name in _OWN_OPTIONS[str(info.field_name)]:
                raise ValueError(f"{option!r} is set by BiRoute from the run; leave it out")
        return options

    @field_validator("environment", mode="before")
    @classmethod
    def _check_environment(cls, environment: object) -> object:
        if not isinstance(environment, dict):
            return environment
        for name in environment:
            if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
                raise ValueError(f"{name!r} is not a name of an environment variable")
        # Numbers, as in `NCCL_IB_TIMEOUT: 22`, are meant as text.
        return {name: str(value) if type(value) in (int, float) else value for name, value in environment.items()}


def load_profile(name: str | None) -> ClusterProfile:
    """Read a cluster profile and check it.

    Args:
        name: a YAML file, or the name of a profile that ships with BiRoute.

    Raises:
        UsageError: no profile is named, it does not exist, or it is not valid, or its hardware
            profile does not exist.
    """
    shipped = resources.files("biroute.configs").joinpath(SHIPPED)
    known = ", ".join(sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir()))
    if not name:
        raise UsageError(f"slurm.profile is empty; set it to a cluster profile (a YAML file), or to one of {known}")
    path = Path(name)
    source = path if path.is_file() else shipped.joinpath(f"{name}.yaml")
    if not source.is_file():
        raise UsageError(f"slurm.profile={name}: no such cluster profile; name a YAML file, or one of {known}")
    try:
        tree = parse_yaml(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{name}: not a readable YAML file ({' '.join(str(error).split())})") from None
    try:
        profile = ClusterProfile.model_validate(tree or {})
    except ValidationError as error:
        raise UsageError(f"slurm.profile={name}: {explain_problems(error, ClusterProfile)}") from None
    if profile.hardware is None:
        return profile
    return profile.model_copy(update={"hardware": _find_hardware(profile.hardware, name, path.absolute().parent)})


def _find_hardware(hardware: str, profile: str, folder: Path) -> str:
    """Return the absolute path of a hardware profile, as others may use it from another folder, or a shipped name."""
    if (folder / hardware).is_file():
        return str(folder / hardware)
    shipped = resources.files("biroute.configs").joinpath(SHIPPED_HARDWARE)
    known = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if hardware in known:
        return hardware
    raise UsageError(
        f"slurm.profile={profile}: hardware={hardware}: no such hardware profile; name a YAML file, from {folder} "
        f"on, or one of {', '.join(known)}"
    )


def dump_profile(profile: ClusterProfile) -> str:
    """Format the profile as YAML, with every field."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
