"""`meta.json` of a checkpoint: what it holds, and where. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from biroute.configs.errors import UsageError

FORMAT: Literal[1] = 1
META_NAME = "meta.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class TrainingProgress(_Record):
    """How far training has come; with the weights, all that a run needs to resume."""

    step: int  # optimizer steps done, those skipped included
    skipped_steps: int = 0  # their gradient was not finite, so AdamW knows nothing of them
    sequences: int  # global position in the data
    evaluation_pending: bool = False  # a stop cut off the evaluation that is due after this step


class Fingerprint(_Record):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class ParameterFiles(_Record):
    """Where the parts of one parameter are."""

    files: dict[int, str]  # tensor rank -> file
    split: tuple[int, int] | None  # dimension and stride that tensor ranks cut it along; None: each has all of it


class CheckpointMeta(_Record):
    """The content of `meta.json`."""

    format: Literal[1] = FORMAT
    progress: TrainingProgress
    about: dict[str, Any]  # `about["model"]` is what a loading run is checked against
    files: dict[str, Fingerprint]
    parameters: dict[str, ParameterFiles]

    @property
    def model(self) -> dict[str, Any]:
        """The settings that two runs must share for one to load the other's weights."""
        model: dict[str, Any] = self.about["model"]
        return model


def read_meta(path: Path) -> CheckpointMeta:
    """Read meta.json of the checkpoint `path`.

    Raises:
        UsageError: written in a format that this version does not read.
        OSError, ValueError: damaged or incomplete.
    """
    text = (path / META_NAME).read_text(encoding="utf-8")
    found = _AnyFormat.model_validate_json(text).format
    if found != FORMAT:
        raise UsageError(f"{path}: checkpoint format {found}, this BiRoute reads {FORMAT}")
    meta = CheckpointMeta.model_validate_json(text)
    if not isinstance(meta.about.get("model"), dict):
        raise ValueError("about.model is missing")
    return meta


class _AnyFormat(BaseModel):
    """The one field that every format has."""

    format: int
