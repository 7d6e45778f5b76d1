"""The batch script of a run, as a pure function from a request to text. No torch.

Values enter the script only through filters that quote them, and an expression without such a filter is an error. So
no value can end a line, a directive or a shell word.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from biroute.configs.cluster_profile import ClusterProfile
from biroute.launcher.attempts.run_files import SCRIPT, SUBMISSION

TEMPLATE = "train.sbatch.j2"


@dataclass(frozen=True)
class JobRequest:
    """What a job requests from Slurm. Paths are absolute.

    Attributes:
        python: the command that starts the ranks' interpreter.
        host_python: an interpreter outside of containers. It keeps the attempt journal where pyxis starts the
            containers, because only srun's tasks are inside those.
        below_mount_point: whether the parent of the run folder is where a file system is mounted: a node that has not
            mounted it has an empty folder there.
    """

    run_dir: Path
    working_dir: Path
    profile: ClusterProfile
    python: tuple[str, ...]
    host_python: str
    nodes: int
    ranks_per_node: int
    time_limit: str | None
    signal_seconds: int
    requeue: bool
    max_restarts: int
    below_mount_point: bool = False

    @property
    def script(self) -> Path:
        return self.run_dir / SUBMISSION / SCRIPT

    @property
    def job_name(self) -> str:
        return self.run_dir.name


def render_job(request: JobRequest) -> str:
    """Render the batch script; equal requests give equal text."""
    profile = request.profile
    return render(
        TEMPLATE,
        run_name=request.job_name,
        script=str(request.script),
        run_dir=str(request.run_dir),
        options=list(_options(request)),
        requeue=request.requeue,
        below_mount_point=request.below_mount_point,
        max_restarts=Quoted(request.max_restarts),
        python=request.python,
        journal_python=(request.host_python,) if container_options(profile) else request.python,
        cpus_per_rank=str(profile.cpus_per_rank),
        signal_seconds=Quoted(request.signal_seconds),
        network_interface=profile.network_interface,
        environment=sorted(profile.environment.items()),
        setup=profile.setup,
        venv=str(profile.venv) if profile.venv else None,
        srun_options=profile.srun_options,
        container_options=container_options(profile),
    )


def render(template: str, **values: Any) -> str:
    """Render a template of this package, in which only quoted values are accepted."""
    return _template(template).render(**values)


def container_options(profile: ClusterProfile) -> tuple[str, ...]:
    """Return the options of srun that start a container, which the check of the nodes needs as well."""
    return tuple(option for option in profile.srun_options if re.match(r"--(no-)?container-", option))


def _options(request: JobRequest) -> Iterator[str]:
    """Yield sbatch's options, `--name=value`, in the order of the script."""
    profile = request.profile
    gpus = f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)
    yield from sbatch_options(
        profile,
        {
            "job-name": request.job_name,
            "nodes": request.nodes,
            "ntasks-per-node": request.ranks_per_node,
            "cpus-per-task": profile.cpus_per_rank,
            "gpus-per-node": gpus if profile.gpus_per_node else None,
            "mem": profile.memory_per_node,
            "time": request.time_limit,
            "signal": f"B:USR1@{request.signal_seconds}",
            "chdir": request.working_dir,
            "output": "/dev/null",  # the script writes into the run folder, if it sees it
        },
    )
    yield "--requeue" if request.requeue else "--no-requeue"
    if profile.exclusive:
        yield "--exclusive"
    yield from profile.sbatch_options


def sbatch_options(profile: ClusterProfile, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a job's name, what all jobs on a cluster share, and its other `values` as options; not what is empty."""
    fields = ("account", "partition", "qos", "constraint", "reservation")
    shared = {name: getattr(profile, name) for name in fields}
    found = {"job-name": values["job-name"], **shared, **values}
    yield from (f"--{name}={value}" for name, value in found.items() if value not in (None, ""))


class Quoted(str):
    """Text that a filter has quoted for its place in the template."""


def _sh(value: str) -> Quoted:
    return Quoted(shlex.quote(value))


def _directive(option: str) -> Quoted:
    """Quote one option for an #SBATCH line, where sbatch accepts double quotes and backslashes but no line break."""
    if re.fullmatch(r"[\w./:,=@%+&|*\[\]()-]+", option, re.ASCII):
        return Quoted(option)
    return Quoted('"' + re.sub(r'(["\\])', r"\\\1", _one_line(option)) + '"')


def _comment(value: str) -> Quoted:
    return Quoted(_one_line(value))


def _one_line(value: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", value)


def _refuse_unquoted(value: Any) -> Any:
    if not isinstance(value, Quoted | jinja2.Undefined):
        raise TypeError(f"{value!r} is put into the script without a filter that quotes it")
    return value


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_refuse_unquoted,
        autoescape=False,  # that is for HTML
    )
    # verbatim is for the profile's own lines of shell.
    environment.filters |= {"sh": _sh, "directive": _directive, "comment": _comment, "verbatim": Quoted}
    text = resources.files("biroute.slurm").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(text)
