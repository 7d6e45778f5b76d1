"""`biroute bench memory`: peak memory of training by the number of ranks that share each sequence.

Each row is a new run of `biroute train` for a few steps in separate processes, and its numbers are the run's metrics.
The runs follow one another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.load import load_config
from biroute.data_pipeline.dataset import open_dataset
from biroute.launcher.bench.report import (
    COLOURS,
    Page,
    Part,
    Picture,
    Table,
    environment_info,
    say,
)
from biroute.launcher.track.figures import new_figure, save_figure

RANKS = (1, 2, 4)
_HEADER = [
    "region ranks", "tokens of a rank", "peak of the worst rank", "at most in all", "over one rank",
    "loss of step 1", "received by a rank and step",
]  # fmt: skip


def run_bench(path: Path, overrides: Sequence[str], ranks: Sequence[int], steps: int) -> dict[str, Any]:
    """Train for a few steps with each number of ranks, and return the measurements as plain values.

    Args:
        path: the configuration.
        overrides: overrides of the configuration, `section.field=value`.
        ranks: the numbers of region ranks.
        steps: optimizer steps of each run.

    Raises:
        UsageError: a number of ranks does not divide the regions, or a run fails.
    """
    config = load_config(path, list(overrides))
    settings = {size: [*overrides, *_settings(size, steps)] for size in ranks}
    for size, wanted in settings.items():  # reports errors before anything is trained
        resolve_layout(load_config(path, wanted), size)
    open_dataset(config)
    about_run = environment_info()
    rows = [_row(path, wanted, size, config.model.sequence_length) for size, wanted in settings.items()]
    return {
        "benchmark": "memory",
        "environment_info": about_run,
        "settings": {
            "model": config.model.model_dump(mode="json"),
            "vocab_size": config.padded_vocab_size,
            "precision": config.train.precision,
            "zero_stage": config.parallel.zero_stage,
            "microbatch_size": config.train.microbatch_size,
            "steps": steps,
        },
        "rows": rows,
    }


def _settings(ranks: int, steps: int) -> list[str]:
    """Return the overrides that this benchmark applies to every configuration."""
    return [
        f"parallel.region={ranks}", "parallel.tensor=1", "parallel.pipeline=1", "parallel.data=1",
        f"train.steps={steps}", "train.log_every=1", "train.evaluate_every=0", "checkpoint.every_steps=0",
        "tracking.enabled=false", "train.device=cpu",
    ]  # fmt: skip


def _row(path: Path, wanted: Sequence[str], ranks: int, sequence_length: int) -> dict[str, Any]:
    say(f"training with {ranks} region rank(s)")
    with tempfile.TemporaryDirectory(prefix="biroute-bench-") as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "-P", "-m", "biroute.launcher.cli.main", "train", str(path), *wanted]
        done = subprocess.run([*command, f"train.run_dir={run_dir}"], stdout=sys.stderr, check=False)
        if done.returncode:
            raise UsageError(f"training with parallel.region={ranks} ended with exit status {done.returncode}")
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line)["metrics"] for line in lines]
    trained = [point for point in points if "memory/peak_gib" in point]
    return {
        "ranks": ranks,
        "tokens_per_rank": sequence_length // ranks,
        "peak_gib": max(point["memory/peak_gib"] for point in trained),
        "losses": [point["train/loss"] for point in trained],
        "received_bytes": trained[0].get("exchange/region_bytes", 0.0),
        "step_seconds": [point["time/step_seconds"] for point in trained],
    }


def memory_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench memory` from its answer."""
    settings, model = answer["settings"], answer["settings"]["model"]
    introduction = (
        "# Memory: one sequence shared by several ranks\n\n"
        "Made by `biroute bench memory`; do not edit.\n\n"
        f"Measured with `biroute train`: {model['num_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_heads']} query heads in {model['num_kv_heads']} key/value heads, a vocabulary of "
        f"{settings['vocab_size']:,}; sequences of {model['sequence_length']:,} tokens, "
        f"{settings['microbatch_size']} at a time, {settings['precision']}, ZeRO {settings['zero_stage']}. The peak "
        "is the largest resident set of any rank, Python and libraries (which ranks share) included."
    )
    facts = {**answer["environment_info"], "training": f"{settings['steps']} step(s) and one evaluation"}
    parts: list[Part] = [
        Table("Peak memory of training", _HEADER, _rows(answer)),
        Picture("Peak memory", partial(_draw, answer)),
    ]
    return Page("memory", introduction, facts, parts)


def _rows(answer: Mapping[str, Any]) -> list[list[str]]:
    first = answer["rows"][0]["peak_gib"]
    return [
        [
            str(row["ranks"]),
            f"{row['tokens_per_rank']:,}",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['ranks'] * row['peak_gib']:.1f} GiB",
            f"{row['peak_gib'] / first:.2f}",
            f"{row['losses'][0]:.5f}",
            f"{row['received_bytes'] / (1 << 20):.1f} MiB",
        ]
        for row in answer["rows"]
    ]


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    figure, (axes,) = new_figure(1, width=4.6, height=3.4)
    rows = answer["rows"]
    axes.bar([str(row["ranks"]) for row in rows], [row["peak_gib"] for row in rows], color=COLOURS[0], width=0.55)
    axes.set_xlabel("ranks that share a sequence")
    axes.set_ylabel("peak of the worst rank, GiB")
    save_figure(figure, path)
