"""The page of `biroute bench decode`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from biroute.launcher.bench.decode.measure import LLAMA, VARIANTS
from biroute.launcher.bench.report import (
    BASELINE_COLOUR,
    COLOURS,
    Findings,
    Page,
    Part,
    Picture,
    Table,
)
from biroute.launcher.track.figures import new_figure, save_figure

NAMES = [*VARIANTS, LLAMA]
EXACT, ROUTED, DENSE = VARIANTS
_FORWARD = ["tokens", "forward, routed (ms)", "forward, dense (ms)", "routed / dense", "the same of prompts"]


def decode_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench decode` from its answer."""
    model, steps = answer["settings"]["model"], answer["settings"]["steps"]
    attention = model["attention"]
    introduction = (
        "# Decode: one more token, by the length of what stands before it\n\n"
        "Made by `biroute bench decode`; do not edit.\n\n"
        f"{model['num_layers']} layers, hidden size {model['hidden_size']}, {model['num_heads']} query heads in "
        f"{model['num_kv_heads']} key/value heads, a vocabulary of {answer['settings']['vocab_size']:,}, random "
        f"weights, fp32, one sequence. Routes: {attention['topk']} regions of {attention['region_size']} tokens, "
        f"chosen for each token, {attention['descriptors_per_region']} descriptors a region. The time is that of a "
        f"whole step (embedding, all layers, logits), the fastest of {steps} tokens; keys and values before them are "
        "random. Llama runs forward passes with its DynamicCache, without the rest of `generate`, which has a column "
        "of its own: the mean over as many tokens."
    )
    parts: list[Part] = [
        Table("Milliseconds a token", ["tokens before", *NAMES, "its `generate`"], _times(answer)),
        Picture("Time of one more token", partial(_draw, answer)),
        Table("Milliseconds of a prompt", ["tokens", *NAMES], _prompts(answer)),
        Table("A prompt beside training's forward pass", _FORWARD, _forward(answer)),
        Table("Bytes of the cache a token", ["tokens", *NAMES], _bytes(answer)),
        Findings(findings(answer)),
    ]
    return Page("decode", introduction, answer["environment_info"], parts)


def findings(answer: Mapping[str, Any]) -> list[str]:
    """Say what the goals ask: how flat routed decode is, and how it compares."""
    seconds = {
        row["length"]: {name: row["variants"][name]["token_seconds"] for name in NAMES} for row in answer["rows"]
    }
    last = max(seconds)
    first = min((length for length in seconds if length >= 4096), default=min(seconds))
    llama = {row["length"]: row["variants"][LLAMA]["generate_token_seconds"] for row in answer["rows"]}
    return [
        f"From {first:,} to {last:,} tokens a routed token takes "
        f"{seconds[last][ROUTED] / seconds[first][ROUTED]:.2f} times as long, an exact one "
        f"{seconds[last][EXACT] / seconds[first][EXACT]:.2f} times.",
        f"At {last:,} tokens the fast one is {seconds[last][DENSE] / seconds[last][ROUTED]:.1f} times as fast as our "
        f"dense decode and {seconds[last][LLAMA] / seconds[last][ROUTED]:.1f} times as fast as {LLAMA}.",
        f"The fast one is slower than a forward pass of {LLAMA} "
        f"{_where(length for length, of in seconds.items() if of[ROUTED] > of[LLAMA])}, and than its `generate` "
        f"{_where(length for length, of in seconds.items() if of[ROUTED] > llama[length])}.",
    ]


def _where(lengths: Iterable[int]) -> str:
    found = ", ".join(f"{length:,}" for length in lengths)
    return f"at {found} tokens" if found else "nowhere"


def _times(answer: Mapping[str, Any]) -> list[list[str]]:
    return [
        [f"{row['length']:,}", *(_ms(row, name, "token_seconds") for name in NAMES),
         _ms(row, LLAMA, "generate_token_seconds")]
        for row in answer["rows"]
    ]  # fmt: skip


def _forward(answer: Mapping[str, Any]) -> list[list[str]]:
    """Return training's forward pass, and whether a prompt keeps its ratio of routed to dense."""
    rows = []
    for row in answer["rows"]:
        routed, dense = row["variants"][ROUTED], row["variants"][DENSE]
        if "forward_seconds" in routed:
            ratios = (f"{routed[what] / dense[what]:.2f}" for what in ("forward_seconds", "prompt_seconds"))
            times = (_ms(row, name, "forward_seconds") for name in (ROUTED, DENSE))
            rows.append([f"{row['length']:,}", *times, *ratios])
    return rows


def _prompts(answer: Mapping[str, Any]) -> list[list[str]]:
    rows = [row for row in answer["rows"] if "prompt_seconds" in row["variants"][LLAMA]]
    return [[f"{row['length']:,}", *(_ms(row, name, "prompt_seconds") for name in NAMES)] for row in rows]


def _ms(row: Mapping[str, Any], name: str, what: str) -> str:
    return f"{1000 * row['variants'][name][what]:,.1f}"


def _bytes(answer: Mapping[str, Any]) -> list[list[str]]:
    row = answer["rows"][-1]
    return [[f"{row['length']:,}", *(f"{row['variants'][name]['bytes_per_token']:,.0f}" for name in NAMES)]]


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    figure, (axes,) = new_figure(1, width=5.4, height=3.6)
    lengths = [row["length"] for row in answer["rows"]]
    colours = dict(zip(VARIANTS, COLOURS, strict=False)) | {LLAMA: BASELINE_COLOUR}
    for name in NAMES:
        times = [1000 * row["variants"][name]["token_seconds"] for row in answer["rows"]]
        axes.plot(lengths, times, marker="o", markersize=3, color=colours[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("ms a token")
    axes.legend(frameon=False)
    save_figure(figure, path)
