"""The answer of `biroute bench recall` as a table, a page for docs/benchmarks and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_INTRODUCTION = """\
# Recall: does the route find what matters?

Made by `biroute bench recall`; do not edit. What the variants are and what follows from this:
[routing.md](../routing.md).

Multi-query associative recall. A sequence of {length} tokens holds {pairs} key-value pairs, scattered among noise.
Each key occurs once more, at a uniformly distributed distance, and the model must predict its value. Chance level is
{guess:.3f}. The model has {layers} layers, hidden size {hidden}, {heads} query heads in {groups} key/value heads of
head size {head} and RoPE. Sequences grow during training from {short} over {middle} to {length} tokens.

Names: `token-4x8` routes each token separately to 8 regions of 4 tokens; in `block4` and `region`, 4 tokens or a
whole region share one route, chosen by the first token; `local` attends to the last regions; `parts2` has 2
descriptors per region (`descriptors_per_region`), of which the better match counts; `dense0` (`dense1`) has a dense
first (second) layer. Keys are smeared (`key_smear`) except in `no-smear`. The own and the previous region are always
routed to, except the previous one in `no-previous`. *Random route*: the same trained weights under a random route.
Accuracies are means over the seeds, followed by the values of the seeds.
"""


def recall_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench recall` from its answer."""
    settings, size = answer["settings"], answer["settings"]["size"]
    length = settings["sequence_length"]
    introduction = _INTRODUCTION.format(
        length=length, short=length // 8, middle=length // 4, pairs=length // 8, guess=1 / answer["num_values"],
        layers=size["num_layers"], hidden=size["hidden_size"], heads=size["num_heads"],
        groups=size["num_kv_heads"], head=size["head_size"],
    )  # fmt: skip
    facts = {**answer["environment_info"], **_training_facts(answer)}
    unit = answer["distance_unit_tokens"]
    title = f"Recall after {settings['steps']} steps, {len(answer['seeds'])} seed(s)"
    parts: list[Part] = [
        Table(title, _header(answer), _rows(answer)),
        f"Distances are in regions of {unit} tokens, whatever the variant's own region size.",
        Picture("Accuracy by distance", partial(_draw, answer)),
    ]
    return Page("recall", introduction, facts, parts)


def _training_facts(answer: Mapping[str, Any]) -> dict[str, str]:
    settings = answer["settings"]
    questions = settings["evaluation_sequences"] * (settings["sequence_length"] // 8)
    difference = max(row["largest_difference_to_bi_level_attention"] for row in answer["rows"])
    return {
        "training": f"{settings['steps']} steps of {settings['tokens_per_step']} tokens, AdamW, learning rate "
        f"{settings['learning_rate']}; every variant sees the same sequences from the same seed",
        "seeds": ", ".join(map(str, answer["seeds"])),
        "scored on": f"{questions:,} questions, the same for every variant",
        "attention": f"computed through a mask; logits differ from `bi_level_attention` by at most {difference:.1e}",
    }


def _header(answer: Mapping[str, Any]) -> list[str]:
    bins = [f"{first}–{last}" for first, last in answer["distance_bins"]]
    return ["variant", "tokens seen", "accuracy", "by seed", "random route", *bins]


def _rows(answer: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            f"1/{round(1 / row['share_of_tokens'])}" if row["share_of_tokens"] < 1 else "all",
            f"{mean(row['accuracy']):.3f}",
            each(row["accuracy"]),
            f"{mean(row['random_route']):.3f}" if row["kind"] == "bi_level" else "–",
            *("–" if value is None else f"{value:.2f}" for value in row["by_distance"]),
        ]
        for row in answer["rows"]
    ]


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy by distance (left), and each variant compared with its weights under a random route (right)."""
    rows: Sequence[Mapping[str, Any]] = answer["rows"]
    figure, (by_distance, overall) = new_figure(2, width=5.6, height=1.6 + 0.21 * max(12, len(rows)))
    labels = [f"{first}–{last}" for first, last in answer["distance_bins"]]
    left_out = ("parts2", "-no-", "post-rope")  # too many for distinct colours; the right plot has all variants
    shown = [row for row in rows if not any(part in row["name"] for part in left_out)][: len(COLOURS) + 2]
    colours = iter(COLOURS)
    for row in shown:
        baseline = row["kind"] != "bi_level"
        values = [float("nan") if value is None else value for value in row["by_distance"]]
        by_distance.plot(
            labels,
            values,
            label=row["name"],
            color=BASELINE_COLOUR if baseline else next(colours, BASELINE_COLOUR),
            linestyle="--" if row["kind"] == "sliding_window" else "-",
            linewidth=2.0 if baseline else 1.3,
            marker="o",
            markersize=3,
        )
    by_distance.set_xlabel(f"distance of the pair, in regions of {answer['distance_unit_tokens']} tokens")
    by_distance.set_ylabel("accuracy")
    by_distance.set_ylim(-0.02, 1.04)
    by_distance.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=3)
    places = list(range(len(rows)))[::-1]
    overall.barh(places, [mean(row["accuracy"]) for row in rows], color=COLOURS[0], height=0.62, label="as trained")
    routed = [(place, row) for place, row in zip(places, rows, strict=True) if row["kind"] == "bi_level"]
    overall.barh(
        [place for place, _ in routed],
        [mean(row["random_route"]) for _, row in routed],
        color=COLOURS[1],
        height=0.26,
        label="same weights, random route",
    )
    overall.set_yticks(places, [row["name"] for row in rows])
    overall.set_xlabel("accuracy")
    overall.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16))
    save_figure(figure, path)
