"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="values to use instead of the file's")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
# Which trained model, and how it computes: the fields of `ModelChoice`.
RunOrConfig = Annotated[
    Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="the run, by its folder or configuration")
]
Checkpoint = Annotated[int | None, typer.Option(help="step of the checkpoint; left out: the newest valid")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16")]
Fast = Annotated[
    bool, typer.Option("--fast", help="on a CPU: all sums in fp32; where a prompt ends may then change a text")
]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="file of the tokenizer; left out: the run's, or its dataset's")
]
# How a text is continued: the fields of `Settings`, which has their defaults.
Temperature = Annotated[float, typer.Option(help="divides the logits; 0: always the likeliest token")]
TopK = Annotated[int, typer.Option(help="draw only from so many likeliest tokens; 0: from all")]
TopP = Annotated[float, typer.Option(help="draw only from the likeliest tokens with this probability")]
MinP = Annotated[float, typer.Option(help="draw only tokens with this fraction of the likeliest one's probability")]
RepetitionPenalty = Annotated[float, typer.Option(help="weakens tokens that occurred before; 1: none")]
MaxBatch = Annotated[int, typer.Option(help="texts that are generated at the same time; changes none")]
