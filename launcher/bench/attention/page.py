"""The answer of `biroute bench attention` as tables, a page for docs/benchmarks and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from biroute.launcher.bench.report import (
    BASELINE_COLOUR,
    COLOURS,
    Findings,
    Page,
    Picture,
    Table,
)
from biroute.launcher.track.figures import new_figure, save_figure

_HEADER = [
    "setting", "S", "L", "k", "Lq", "n", "G", "path", "route ms", "forward ms", "backward ms", "ratio", "of ideal",
    "peak MiB", "target",
]  # fmt: skip
_STEP_HEADER = ["attention", "L", "k", "Lq", "seconds", "tokens/s", "ratio", "target"]
_INTRODUCTION = """\
# Speed and memory of routed attention

Made by `biroute bench attention`; do not edit.

Forward and backward of one causal attention layer in fp32, {heads} query heads of size {head}, one sequence. *Ratio*:
time of dense `scaled_dot_product_attention`, run alternately, divided by that of routing + forward + backward. *Of
ideal*: that ratio divided by the ratio of operations S / (2 k L). *Peak*: the peak memory in addition to the inputs
(not measured beyond 16,384 tokens). *Path*: auto is the default; the others are forced, up to 4,096 tokens.
"""


def attention_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench attention` from its answer."""
    one = (answer["targets"] or answer["sweep"])[0]
    return Page(
        "attention",
        _INTRODUCTION.format(heads=one["num_heads"], head=one["head_size"]),
        {**answer["environment_info"], **answer["settings"]},
        [
            Table("Settings with a target", _HEADER, _rows(answer["targets"])),
            Table("Over the length", _HEADER, _rows(answer["sweep"])),
            Findings(_findings(answer)),
            *_step_tables(answer["train_steps"]),
            Picture("Time and memory over the length", partial(_draw, answer["sweep"])),
        ],
    )


def _findings(answer: Mapping[str, Any]) -> list[str]:
    slope = answer["slope"]
    lines = (
        [] if slope is None else [f"slope of log time in log S with automatic L, from 2,048 tokens on: {slope:.2f}"]
    )
    for name, length in answer["break_even"].items():
        where = "never in this range" if length is None else f"from {length:,} tokens on"
        lines.append(f"{name}: at least as fast as dense {where}")
    return lines


def _step_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not rows:
        return []
    one = rows[0]
    size = f"{one['num_layers']} layers, hidden {one['hidden_size']}, S {one['num_tokens']:,}"
    return [Table(f"A whole training step: {size}", _STEP_HEADER, _step_rows(rows))]


def _step_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            row["name"],
            *(
                "–" if row["kind"] == "dense" else str(row[name])
                for name in ("region_size", "topk", "query_block_size")
            ),
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            "–" if row["target"] is None else f"{row['target']:g}",
        ]
        for row in rows
    ]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            row["name"],
            f"{row['num_tokens']:,}",
            *(
                str(row[name]) if row["path"] != "dense" else "–"
                for name in ("region_size", "topk", "query_block_size", "descriptors_per_region")
            ),
            str(row["num_kv_heads"]),
            row["path"],
            *(f"{row[name] * 1e3:,.0f}" for name in ("route_seconds", "forward_seconds", "backward_seconds")),
            f"{row['ratio']:.2f}",
            "–" if row["of_ideal"] is None else f"{row['of_ideal']:.2f}",
            "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}",
            "–" if row["target"] is None else f"{row['target']:g}",
        ]
        for row in rows
    ]


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw time (left) and peak memory (right) over the length."""
    figure, (time_axis, memory_axis) = new_figure(2)
    names = list(dict.fromkeys(row["name"] for row in rows))
    colours = iter(COLOURS)
    for name in names:
        mine = [row for row in rows if row["name"] == name and row["path"] in ("auto", "dense")]
        style = {"color": BASELINE_COLOUR if name == "dense" else next(colours), "marker": "o", "markersize": 3.5}
        lengths = [row["num_tokens"] for row in mine]
        time_axis.loglog(lengths, [row["seconds"] for row in mine], label=name, **style)
        peaks = [float("nan") if row["peak_mib"] is None else row["peak_mib"] for row in mine]
        memory_axis.loglog(lengths, peaks, label=name, **style)
    for axis, label in ((time_axis, "forward + backward, s"), (memory_axis, "peak memory without inputs, MiB")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of a sequence", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    time_axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
