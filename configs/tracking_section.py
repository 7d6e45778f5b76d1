"""The `tracking` section of a configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from biroute.configs.section import Section

# What BiRoute sets, and the fields that are tags; see launcher/track/mlflow_run.py.
_RESERVED_TAGS = (
    r"(biroute|mlflow|attempt|version|git|config|parallel|train|data|slurm)\..*"
    r"|attempt|layout|world_size|host|nonfinite|group|copied_from"
)


def _check_tags(tags: dict[str, str]) -> dict[str, str]:
    if reserved := [name for name in tags if re.fullmatch(_RESERVED_TAGS, name)]:
        raise ValueError(f"tag {reserved[0]!r} is one that BiRoute or MLflow sets; choose another name")
    return tags


def _check_run_id(text: str) -> str:
    if not re.fullmatch(r"|[0-9a-f]{32}", text):
        raise ValueError("not the id of an MLflow run, which has 32 hexadecimal digits and stands on the run's page")
    return text


class TrackingConfig(Section):
    """Tracking with MLflow."""

    enabled: bool = Field(True, description="send metrics to MLflow; the metrics log on disk is written in any case")
    uri: str = Field(
        "",
        description="MLflow tracking URI; empty: the variable MLFLOW_TRACKING_URI, or the SQLite file mlflow.db next "
        "to the run folder",
    )
    experiment: str = Field(
        "",
        max_length=256,
        description="MLflow experiment; empty: the variable MLFLOW_EXPERIMENT_NAME, or `biroute`",
    )
    run_name: str = Field(
        "", max_length=250, description="MLflow run name; empty: the name of the run folder and the layout"
    )
    tags: Annotated[dict[str, str], AfterValidator(_check_tags)] = Field(
        {}, description="tags of the MLflow run, such as `{team: nlp}`"
    )
    group: str = Field(
        "", max_length=250, description="value of the MLflow tag `group`, by which runs can be grouped"
    )
    parent: Annotated[str, AfterValidator(_check_run_id)] = Field(
        "", description="id of the MLflow run under which this one is listed; empty: none"
    )
    timeout_seconds: float = Field(
        5.0, gt=0, description="wait for one call to the MLflow server; of a slow one, up to 120 s after some calls"
    )
    flush_seconds: float = Field(
        30.0,
        ge=0,
        description="longest wait at the end for metrics not yet sent; in a Slurm job at most a quarter of "
        "slurm.signal_seconds",
    )
