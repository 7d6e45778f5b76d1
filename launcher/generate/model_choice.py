"""Which trained model a command uses, and how it computes: options of each command that opens one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from biroute.configs.errors import UsageError


@dataclass(frozen=True)
class ModelChoice:
    """A checkpoint of a run, and how its model computes.

    Attributes:
        run: the run's folder, or its configuration.
        step: of the checkpoint; None: the newest one that is valid.
        device: auto (the GPU if there is one), cpu or cuda.
        precision: fp32, in which checkpoints are stored, or bf16.
        tokenizer: its file; None: the one that the run keeps, or else that of its dataset.
        fast: on a CPU, sums in fp32 alone; where a prompt ends may then change a text.

    Raises:
        UsageError: there is no such device or precision.
    """

    run: Path
    step: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    tokenizer: Path | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device={self.device} is unknown; use auto, cpu or cuda")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"--precision={self.precision} is unknown; use fp32 or bf16")
