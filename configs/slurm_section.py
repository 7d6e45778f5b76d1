"""The `slurm` section of a configuration. Settings of a whole cluster are in its profile."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from biroute.configs.section import Section

_SLURM_TIME = r"\d+|\d+:\d\d?|\d+:\d\d?:\d\d?|\d+-\d+(:\d\d?){0,2}|UNLIMITED|INFINITE"


def _check_slurm_time(value: object) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(_SLURM_TIME, text, re.IGNORECASE):
        raise ValueError("not a time that Slurm accepts; use minutes, hours:minutes:seconds or days-hours")
    return text


SlurmTime = Annotated[str, BeforeValidator(_check_slurm_time)]


class SlurmConfig(Section):
    """What `biroute submit` requests from a Slurm cluster. Settings of the whole cluster are in its profile."""

    profile: str | None = Field(
        None, description="cluster profile: a YAML file, or the name of a shipped one; required by `biroute submit`"
    )
    nodes: PositiveInt = Field(1, description="nodes to train on")
    ranks_per_node: PositiveInt | None = Field(
        None,
        description="ranks per node; empty: the profile's GPUs per node, or the layout's ranks divided by the nodes",
    )
    time_limit: SlurmTime | None = Field(
        None, description="time limit of a job in sbatch's format (24:00:00, 2-0, minutes); empty: the profile's"
    )
    signal_seconds: int = Field(
        120,
        ge=60,
        description="seconds before the time limit at which to save and stop; Slurm may be a minute early or late",
    )
    requeue: bool = Field(True, description="queue the job again after a stop, a crash or the loss of a node")
    max_restarts: int = Field(20, ge=0, description="how often a job is queued again after crashes and hangs")
    max_crashes_at_same_step: PositiveInt = Field(
        3, description="after this many crashes at the same step, a job is not queued again"
    )
    max_restarts_without_progress: PositiveInt = Field(
        20, description="after this many attempts in a row without a step, however they ended, it is not queued again"
    )
    preflight_timeout_seconds: float = Field(
        300.0, gt=0, description="time limit of the check of all nodes before training"
    )
