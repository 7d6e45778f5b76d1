"""The follow-up job of `biroute submit --evaluate`, which evaluates each checkpoint beside the training. No torch.

It begins with the training (`--dependency=after`), runs the code that was frozen with it, and ends when the training
has ended or has no job any more. Its results go the way of `biroute evaluate`: into the run folder and the run's own
MLflow run.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from biroute.configs.errors import UsageError
from biroute.configs.files import append_file
from biroute.configs.slurm_section import SlurmTime
from biroute.launcher.attempts.run_files import EVALUATE_SCRIPT, EVALUATIONS, LOGS, SUBMISSION
from biroute.launcher.evaluate.tasks.names import task_names
from biroute.slurm import client
from biroute.slurm.script import JobRequest, Quoted, container_options, render, sbatch_options

TEMPLATE = "evaluate.sbatch.j2"
_PAUSE_SECONDS = 2.0  # of 15 between two looks at the queue
_SIGNAL_SECONDS = 60


@dataclass(frozen=True)
class EvaluationRequest:
    """What a follow-up job is asked for.

    Attributes:
        training: the job that it follows.
        arguments: of `biroute evaluate`, besides the run and --every-checkpoint.
        time_limit: in sbatch's format; None: that of the training. At the limit the job is queued again.
    """

    training: JobRequest
    arguments: tuple[str, ...] = ()
    time_limit: str | None = None

    @property
    def script(self) -> Path:
        return self.training.run_dir / SUBMISSION / EVALUATE_SCRIPT


def parse_arguments(text: str) -> tuple[str, ...]:
    """Return the words of `--evaluate-options`, and check the tasks that they name.

    Raises:
        UsageError: they are not words of a shell, or name what the job sets itself, or a task that there is not.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--evaluate-options={text!r}: {error}; quote it as for a shell") from None
    for word in words:
        name = word.partition("=")[0]
        if name in ("--every-checkpoint", "--follow", "--checkpoint", "--ranks", "--check", "--no-tracking"):
            raise UsageError(f"--evaluate-options: {name} is set by the job, or of no use to it; leave it out")
        if name == "--text" and "--name" not in " ".join(words):
            raise UsageError("--evaluate-options: --text needs --name, by which results that exist are known")
    for before, word in zip(["", *words], words, strict=False):
        if not word.startswith("-") and (not before.startswith("--") or "=" in before):
            raise UsageError(
                f"--evaluate-options: {word!r} is neither an option of `biroute evaluate` nor the value of one; "
                "leave it out"
            )
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--tasks" or word.startswith("--tasks="):
            task_names(word.partition("=")[2] or following)
    return tuple(words)


def check_time_limit(time_limit: str | None) -> None:
    """Check a time limit of the job.

    Raises:
        UsageError: Slurm has no such time.
    """
    if time_limit is None:
        return
    try:
        TypeAdapter(SlurmTime).validate_python(time_limit)
    except ValidationError:
        raise UsageError(f"--evaluate-time={time_limit} is no time of Slurm's; use one such as 4:00:00") from None


def render_evaluation(request: EvaluationRequest, pause_seconds: float = _PAUSE_SECONDS) -> str:
    """Render the job's batch script; equal requests give equal text."""
    profile = request.training.profile
    return render(
        TEMPLATE,
        run_name=request.training.job_name,
        script=str(request.script),
        run_dir=str(request.training.run_dir),
        options=list(_options(request)),
        pause_seconds=Quoted(pause_seconds),
        cpus=str(profile.cpus_per_rank),
        environment=sorted(profile.environment.items()),
        setup=profile.setup,
        venv=str(profile.venv) if profile.venv else None,
        container_options=container_options(profile),
        python=request.training.python,
        arguments=request.arguments,
    )


def submit_evaluation(run_dir: Path, training_job: str) -> str:
    """Submit the follow-up job of a run whose training is job `training_job`; returns the job's id.

    Raises:
        UsageError: Slurm refuses the job, or does not answer.
    """
    job_id = client.submit(run_dir / SUBMISSION / EVALUATE_SCRIPT, after=training_job)
    record = {"job_id": job_id, "submitted": time.time(), "training": training_job}
    with append_file(run_dir / SUBMISSION / EVALUATIONS) as file:
        file.write(json.dumps(record).encode() + b"\n")
    return job_id


def _options(request: EvaluationRequest) -> Iterator[str]:
    training, profile = request.training, request.training.profile
    one_gpu = f"{profile.gpu_type}:1" if profile.gpu_type else "1"
    yield from sbatch_options(
        profile,
        {
            "job-name": f"{training.job_name}-evaluate",
            "nodes": 1,
            "ntasks-per-node": 1,
            "cpus-per-task": profile.cpus_per_rank,
            "gpus-per-node": one_gpu if profile.gpus_per_node else None,
            "mem": share_of_memory(profile.memory_per_node, training.ranks_per_node),
            "time": request.time_limit or training.time_limit,
            "signal": f"B:USR1@{_SIGNAL_SECONDS}",
            "chdir": training.working_dir,
            "output": str(training.run_dir / LOGS).replace("%", "%%") + "/evaluate-%j.out",
            "open-mode": "append",
        },
    )
    yield "--requeue"
    yield from profile.sbatch_options


def share_of_memory(memory: str | None, parts: int) -> str | None:
    """Return what one of so many ranks of a node has of its memory, in sbatch's format: a node is not taken whole."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory or "", re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        return None
    megabytes = int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2].upper()]
    return f"{math.ceil(megabytes / parts)}M"
