"""The answer of `biroute bench gpu` as tables and a page for docs/benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from biroute.launcher.bench.gpu.targets import PARTS_TARGET
from biroute.launcher.bench.report import Findings, Page, Part, Table

_INTRODUCTION = """\
# A routed layer on a GPU

Made by `biroute bench gpu`; do not edit.

A causal layer of one sequence, without projections, beside dense `scaled_dot_product_attention`, by turns. Times are
medians, between events of the device, after a first run that compiles. A routed layer is its router (8 descriptors of
a region), forward and backward. *Trained* routes are those of a trained model for real text; *random* ones the
router's for white noise, of which neighbours share least. The router always runs on white noise. So do training
steps: where trained routes were given, every layer's own router runs, as its time counts, and attention goes over
the trained route, the same one in every layer; elsewhere it goes over the router's choice, *random*. A target is
*met* with trained routes; where none were given, with random ones, for which some targets are not expected to be met.
What was expected on paper: [gpu_on_paper.md](gpu_on_paper.md).
"""
_TARGETS = ["target", "S", "Lq", "asked", "trained routes", "random routes", "met"]
_LAYER = ["routes", "S", "Lq", "dense forward ms", "dense backward ms", "router ms", "forward ms", "backward ms",
          "forward, times", "both, times", "peak GiB", "dense peak GiB"]  # fmt: skip
_PARTS = ["", "S", "Lq", "whole ms", "parts ms", "ratio", "target"]


def gpu_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench gpu` from its answer."""
    parts: list[Part] = [
        Table("Targets", _TARGETS, [_target_row(row) for row in answer["targets"]]),
        Table("A layer", _LAYER, [_layer_row(row) for row in answer["layers"]]),
        Table("Parts of region ranks, all on one device", _PARTS, [_parts_row(row) for row in answer["parts"]]),
        *_tables_of_steps(answer["train_steps"]),
        *_tables_of_kernels(answer["layers"]),
        Findings([f"failed: {line}" for line in answer["failed"]]),
    ]
    return Page("gpu", _INTRODUCTION, {**answer["environment_info"], **answer["settings"]}, parts)


def _target_row(row: Mapping[str, Any]) -> list[str]:
    values = [f"{row[kind]:.2f}" if kind in row else "–" for kind in ("trained", "random")]
    met = "yes" if row["met"] else "no"
    return [row["name"], f"{row['tokens']:,}", str(row["block"]), row["asked"], *values, met]


def _layer_row(row: Mapping[str, Any]) -> list[str]:
    seconds = ("dense_forward", "dense_backward", "route", "forward", "backward")
    return [
        row["routes"],
        f"{row['tokens']:,}",
        str(row["block"]),
        *(f"{1e3 * row[f'{name}_seconds']:.2f}" for name in seconds),
        *(f"{row['compared'][name]:.2f}" for name in ("forward", "both")),
        *(f"{row[name] / 2**30:.2f}" for name in ("peak_bytes", "dense_peak_bytes")),
    ]


def _parts_row(row: Mapping[str, Any]) -> list[str]:
    milliseconds = [f"{1e3 * row[name]:.2f}" for name in ("seconds", "parts_seconds")]
    return [f"{row['ranks']} ranks", f"{row['tokens']:,}", str(row["block"]), *milliseconds, f"{row['ratio']:.2f}",
            f"<= {PARTS_TARGET}"]  # fmt: skip


def _tables_of_steps(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not rows:
        return []
    one = rows[0]
    title = f"A whole training step: {one['num_layers']} layers, hidden {one['hidden_size']}, one sequence"
    cells = [
        [row["name"], row["routes"] or "–", f"{row['num_tokens']:,}", f"{1e3 * row['seconds']:.1f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}",
         "–" if row["target"] is None else f"{row['target']:g}"]
        for row in rows
    ]  # fmt: skip
    return [Table(title, ["attention", "routes", "S", "ms", "tokens/s", "ratio", "target"], cells)]


def _tables_of_kernels(layers: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table of all kernels that take a hundredth of a layer or more."""
    cells = []
    for row in layers:
        total = sum(kernel["seconds"] for kernel in row["kernels"].values())
        for name, kernel in sorted(row["kernels"].items(), key=lambda item: -item[1]["seconds"]):
            if kernel["seconds"] >= total / 100:
                cells.append([name[:60], row["routes"], f"{row['tokens']:,}", str(row["block"]),
                              f"{kernel['launches']:.0f}", f"{1e3 * kernel['seconds']:.2f}"])  # fmt: skip
    title = "Kernels of a layer, router with 8 and with 1 descriptors, as torch's profiler sees them"
    return [Table(title, ["kernel", "routes", "S", "Lq", "launches", "ms"], cells)] if cells else []
