"""Section optim of a configuration: AdamW, its learning-rate schedule, and steps that are skipped."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from biroute.configs.section import OnResume, Section


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    on_resume: ClassVar[OnResume] = "recipe"

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(3e-5, ge=0, description="learning rate at the last step")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="learning rate after the warm-up; cosine: cosine decay; wsd: constant, then linear decay over "
        "decay_steps; constant: no decay",
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="steps of linear warm-up; left out: 100, or half of train.steps if that is less"
    )
    decay_steps: int = Field(0, ge=0, description="steps of the final decay of schedule=wsd")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of the matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's second moment")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    gradient_clip: float = Field(1.0, ge=0, description="clip the gradient to this global norm; 0: no clipping")
    max_skipped_steps: PositiveInt = Field(
        10, description="a step whose gradient is not finite is skipped; after this many in a row the run ends"
    )
    spike_deviations: float = Field(
        0.0,
        ge=0,
        description="skip a step whose gradient norm is more than this many standard deviations above the mean of "
        "the last spike_window steps; 0: never, 6 is usual",
    )
    spike_window: int = Field(128, ge=2, description="steps that a step is compared with")

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("schedule=wsd needs decay_steps of at least 1")
        return self

    def warmup_of(self, steps: int) -> int:
        """Return the steps of warm-up in a run of `steps`."""
        return min(100, steps // 2) if self.warmup_steps is None else self.warmup_steps
