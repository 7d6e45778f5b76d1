"""`meta.json` of a checkpoint: what it holds, and where. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, model_validator

from biroute.configs.errors import UsageError
from biroute.configs.records import read_small

FORMAT: Literal[1] = 1
META_NAME = "meta.json"
STEP_NAME = re.compile(r"step-(\d{8,})")  # of a finished checkpoint's folder
# Exactly the names that a save writes: no other file of a machine is ever opened for what meta.json says.
FileName = Annotated[str, StringConstraints(pattern=r"^weights-pipe\d{2,}-tensor\d{2,}-part\d{2,}\.pt$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class TrainingProgress(_Record):
    """How far training has come; with the weights, all that a run needs to resume."""

    step: NonNegativeInt  # optimizer steps done, those skipped included
    skipped_steps: NonNegativeInt = 0  # their gradient was not finite or a spike: AdamW knows nothing of them
    sequences: NonNegativeInt  # global position in the data
    tokens: NonNegativeInt = 0  # trained on; counted, since a run may go on with another batch size
    gradient_norms: tuple[float, ...] = ()  # of the last steps, if a spike guard looks at them
    evaluation_pending: bool = False  # the evaluation that is due after this step is not done


class Fingerprint(_Record):
    """Size and SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: str


class ParameterFiles(_Record):
    """Where the parts of one parameter are."""

    files: dict[int, str] = Field(min_length=1)  # tensor rank -> file
    split: tuple[int, int] | None  # dimension and stride that tensor ranks cut it along; None: each has all of it


class RenamedError(ValueError):
    """A checkpoint's folder has the name of another step."""


class CheckpointMeta(_Record):
    """The content of `meta.json`."""

    format: Literal[1] = FORMAT
    progress: TrainingProgress
    kept: bool = False  # for ever: pruning leaves it alone
    about: dict[str, Any]  # `about["model"]` is what a loading run is checked against
    files: dict[FileName, Fingerprint]
    parameters: dict[str, ParameterFiles]

    @model_validator(mode="after")
    def _check(self) -> CheckpointMeta:
        if not isinstance(self.about.get("model"), dict):
            raise ValueError("about.model is missing")
        for name, parameter in self.parameters.items():
            for file in parameter.files.values():
                if file not in self.files:
                    raise ValueError(f"{name} is in {file!r}, which has no checksum in files")
            if sorted(parameter.files) != list(range(len(parameter.files))) and parameter.split is not None:
                raise ValueError(f"{name}: parts of tensor ranks {sorted(parameter.files)} only")
        return self

    @property
    def model(self) -> dict[str, Any]:
        """The settings that two runs must share for one to load the other's weights."""
        model: dict[str, Any] = self.about["model"]
        return model


def read_meta(path: Path) -> CheckpointMeta:
    """Read meta.json of the checkpoint `path`.

    Raises:
        UsageError: written in a format that this version does not read.
        RenamedError: its folder has the name of another step.
        OSError, ValueError: damaged or incomplete.
    """
    text = read_small(path / META_NAME)
    found = _AnyFormat.model_validate_json(text).format
    if found != FORMAT:
        raise UsageError(f"{path}: checkpoint format {found}, this BiRoute reads {FORMAT}")
    meta = CheckpointMeta.model_validate_json(text)
    name = STEP_NAME.fullmatch(path.name)
    if name is not None and int(name[1]) != meta.progress.step:
        raise RenamedError(f"it holds step {meta.progress.step}; give the folder its own name back")
    return meta


class _AnyFormat(BaseModel):
    """The one field that every format has."""

    format: int
