"""The answer of `biroute bench quality` as a table, a page for docs/benchmarks and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from biroute.launcher.bench.report import (
    BASELINE_COLOUR,
    COLOURS,
    Page,
    Part,
    Picture,
    Table,
    each,
    mean,
)
from biroute.launcher.track.figures import new_figure, save_figure

_HEADER = ["variant", "L", "Lq", "topk", "bits per byte", "by seed", "over dense", "random route", "nats per token"]

_INTRODUCTION = """\
# Quality: held-out bits per byte on real text

Made by `biroute bench quality`; do not edit. What follows from it: [routing.md](../routing.md).

The real model, engine and loader on one process: {layers} layers, hidden size {hidden}, {heads} query heads in
{groups} key/value heads of head size {head}, sequences of {length} tokens, a vocabulary of {vocabulary}. All but
`dense` see at most {seen} tokens, {share:.3g} of a sequence. Every variant starts from the same weights and trains
on the same sequences; seeds differ in both. `token` has one descriptor for each region, `token-parts` four,
`token-fine` regions a quarter of the size. Keys are smeared except in `no-smear`; `dense0`: a dense first layer.
*Random route*: the same trained weights under a random route. *Over dense*: mean over the seeds of the difference to
dense with the same seed.
"""


def quality_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench quality` from its answer."""
    settings, model = answer["settings"], answer["settings"]["model"]
    introduction = _INTRODUCTION.format(
        layers=model["num_layers"], hidden=model["hidden_size"], heads=model["num_heads"],
        groups=model["num_kv_heads"], head=model["head_size"], length=model["sequence_length"],
        vocabulary=settings["vocab_size"], seen=settings["tokens_seen"],
        share=settings["tokens_seen"] / model["sequence_length"],
    )  # fmt: skip
    tokens = settings["steps"] * settings["tokens_per_step"]
    facts = {
        **answer["environment_info"],
        "training": f"{settings['steps']} steps of {settings['tokens_per_step']:,} tokens, {tokens:,} in all, peak "
        f"learning rate {settings['learning_rate']}: far too few for a good model, the same for all",
        "seeds": ", ".join(map(str, answer["seeds"])),
        "scored on": f"{settings['heldout_sequences']} held-out sequences, the same for every variant",
    }
    title = f"Held-out bits per byte after {settings['steps']} steps, {len(answer['seeds'])} seed(s)"
    parts: list[Part] = [Table(title, _HEADER, _rows(answer)), Picture("Bits per byte", partial(_draw, answer))]
    return Page("quality", introduction, facts, parts)


def _rows(answer: Mapping[str, Any]) -> list[list[str]]:
    dense = next((row["bits_per_byte"] for row in answer["rows"] if row["name"] == "dense"), None)
    rows = []
    for row in answer["rows"]:
        routed = row["kind"] == "bi_level"
        over = "–"
        if dense is not None:
            over = f"{mean([x - y for x, y in zip(row['bits_per_byte'], dense, strict=True)]):+.4f}"
        rows.append(
            [
                row["name"],
                str(row["region_size"]) if row["kind"] != "dense" else "–",
                str(row["query_block_size"]) if routed else "–",
                str(row["topk"]) if row["kind"] != "dense" else "–",
                f"{mean(row['bits_per_byte']):.4f}",
                each(row["bits_per_byte"], 4),
                over,
                f"{mean(row['random_route']):.4f}" if routed else "–",
                f"{mean(row['nats_per_token']):.3f}",
            ]
        )
    return rows


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    """Draw the score of each seed as a dot, and that of the random route as a cross."""
    rows = answer["rows"]
    figure, (axes,) = new_figure(1, width=6.4, height=1.2 + 0.26 * max(6, len(rows)))
    for place, row in zip(range(len(rows))[::-1], rows, strict=True):
        routed = row["kind"] == "bi_level"
        colour = COLOURS[0] if routed else BASELINE_COLOUR
        axes.plot(row["bits_per_byte"], [place] * len(row["bits_per_byte"]), "o", color=colour, markersize=5)
        if routed:
            axes.plot(row["random_route"], [place] * len(row["random_route"]), "x", color=COLOURS[1], markersize=5)
    axes.plot([], [], "o", color=COLOURS[0], label="routed, each seed")
    axes.plot([], [], "o", color=BASELINE_COLOUR, label="not routed")
    axes.plot([], [], "x", color=COLOURS[1], label="same weights, random route")
    axes.set_yticks(list(range(len(rows)))[::-1], [row["name"] for row in rows])
    axes.set_xlabel("held-out bits per byte (lower is better)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=3)
    save_figure(figure, path)
