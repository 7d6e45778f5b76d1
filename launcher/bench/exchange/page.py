"""The answer of `biroute bench exchange` as tables, a page for docs/benchmarks and a picture."""

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
)
from biroute.launcher.track.figures import new_figure, save_figure

_BYTES = ("causal_fetch", "ring", "descriptors", "bound", "fetch", "ship", "auto")
_HEADER = [
    "ranks", "regions of a rank", "causal-only fetch", "ring", "descriptors", "bound", "fetch", "ship", "auto",
    "auto / causal-only", "with random routes", "shipped", "worst rank", "hottest sender",
]  # fmt: skip
_MEASURED_HEADER = [
    "run", "tokens", "ranks", "payload measured", "payload planned", "plan of one process",
    "received in all", "waiting / pass",
]  # fmt: skip
_QUARTER = 0.25

_INTRODUCTION = """\
# Exchange: bytes between ranks that share a sequence

Made by `biroute bench exchange`; do not edit. How the exchange works: [architecture.md](../architecture.md); what
sharing saves in memory: [memory.md](memory.md).

Routes of held-out text in trained models of {layers} layers, {heads} query heads in {groups} key/value heads, head
size {head}. Bytes that a rank receives in forward of one layer and one sequence in {precision}, mean over ranks,
layers and sequences ({sequences}); backward moves the gradients of the same rows.

- *causal-only fetch*: keys and values of all earlier ranks; *ring*: those of all other ranks, as with ring attention
  or an all-gather; *bound*: the most that the chosen plan could move for any route of this form.
- *descriptors*: gathered in any case to choose the routes; not included in the other columns.
- *fetch*, *ship*, *auto*: all routed regions fetched, all queries shipped, or the cheaper of the two for each pair of
  ranks, sequence and key/value head. *Shipped*: the fraction of pairs that ship.
- *auto / causal-only*: the bytes of the chosen plan relative to the causal-only fetch; *with random routes*: the same
  for these weights under a random router. Learned routes move fewer bytes if they concentrate on a few regions. Where
  the loss under a random router is hardly higher, the router has not learned much yet, and a better one may spread
  more; the random routes are then the conservative estimate.
- *worst rank*: the rank that receives most under auto, relative to the mean; *hottest sender*: the rank that sends
  most.
"""


def exchange_page(answer: Mapping[str, Any]) -> Page:
    """Build the page of `biroute bench exchange` from its answer."""
    settings, model = answer["settings"], answer["settings"]["model"]
    introduction = _INTRODUCTION.format(
        layers=model["num_layers"], heads=model["num_heads"], groups=model["num_kv_heads"],
        head=model["head_size"], precision=settings["precision"], sequences=settings["sequences"],
    )  # fmt: skip
    parts: list[Part] = [Picture("Bytes relative to the causal-only fetch", partial(_draw, answer))]
    for table in answer["tables"]:
        parts += [Table(_title(table), _HEADER, _rows(table)), _verdict(table)]
    if answer["measured"]:
        parts += [Table("Measured on real ranks", _MEASURED_HEADER, _measured_rows(answer)), _MEASURED_TEXT]
    return Page("exchange", introduction, {**answer["environment_info"], **_training(answer)}, parts)


def _training(answer: Mapping[str, Any]) -> dict[str, str]:
    """Describe how long each run was trained, and its loss on the text that was routed."""
    facts: dict[str, str] = {}
    for table in answer["tables"]:
        loss, random_loss = table["nats_per_token"]
        facts.setdefault(  # if there are several lengths, the first one is reported
            f"run {table['run']}",
            f"{table['trained_steps']:,} steps of {table['tokens_per_step']:,} tokens, sequences of "
            f"{table['trained_length']:,}; {loss:.3f} nats per token here, {random_loss:.3f} under a random router",
        )
    return facts


_MEASURED_TEXT = """\
Forward and backward of one sequence on gloo processes of this machine. *Payload*: bytes that the forward pass
moved in routed layers, over all ranks, as counted at the collectives and as planned by the ranks. *Plan of one
process*: planned from the route of a single process, which may differ in the few choices whose affinities are equal
up to rounding. *Received in all*: all bytes, including the backward pass, requests and descriptors. *Waiting*: the
fraction of the pass that the rank with the longest waits spent waiting for others; processes that share cores also
wait for each other's computation.
"""


def _title(table: Mapping[str, Any]) -> str:
    attention = table["attention"]
    trained = table["trained_length"]
    note = "" if table["length"] == trained else f" (trained at {trained:,})"
    return (
        f"{table['run']}: {table['length']:,} tokens{note}, {table['num_regions']:,} regions of "
        f"{attention['region_size']}, topk {attention['topk']}, a route for every "
        + (f"{attention['query_block_size']} tokens" if attention["query_block_size"] > 1 else "token")
    )


def _rows(table: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for row in table["rows"]:
        causal, auto = row["causal_fetch"]["mean"], row["auto"]
        rows.append(
            [
                str(row["ranks"]),
                str(row["regions_per_rank"]),
                *(size(row[name]["mean"]) for name in _BYTES),
                f"{auto['mean'] / causal:.0%}",
                f"{row['random_auto'] / causal:.0%}",
                f"{row['shipped_units']:.0%}",
                f"{auto['worst_rank']}: {auto['worst'] / auto['mean']:.1f}x",
                f"{auto['hottest_sender']}: {auto['hottest'] / auto['mean']:.1f}x",
            ]
        )
    return rows


def _verdict(table: Mapping[str, Any]) -> str:
    """Summarize the chosen plan at 64 ranks; if it moves more than a quarter of the baseline, explain why."""
    row = next((row for row in table["rows"] if row["ranks"] == 64), None)
    if row is None:
        return ""
    causal = row["causal_fetch"]["mean"]
    shares = {way: row[way]["mean"] / causal for way in ("auto", "fetch", "ship", "descriptors")}
    text = (
        f"At 64 ranks the chosen plan moves {shares['auto']:.1%} of the causal-only fetch (fetching alone "
        f"{shares['fetch']:.1%}, shipping alone {shares['ship']:.1%}; with the descriptors "
        f"{shares['auto'] + shares['descriptors']:.1%})"
    )
    random = row["random_auto"] / causal
    if random <= _QUARTER < shares["auto"]:
        return f"{text}: more than a quarter, because these routes spread more than random ones ({random:.1%})."
    if random > _QUARTER:
        text += (
            f"; with random routes it would be {random:.1%}, more than a quarter: every query would visit nearly "
            "topk - 2 other ranks, and its heads would travel to each"
        )
    return f"{text}."


def _measured_rows(answer: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["run"],
            f"{row['length']:,}",
            str(row["ranks"]),
            f"{row['measured_payload']:,}",
            f"{row['planned_payload']:,}",
            f"{row['single_process_plan']:,}",
            f"{sum(row['received_by_kind'].values()):,}",
            f"{row['wait_seconds'] / row['seconds']:.0%}",
        ]
        for row in answer["measured"]
    ]


def size(count: float) -> str:
    """Format a number of bytes with a binary prefix."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1000 and len(units) > 1:
        count, _ = count / 1024, units.pop(0)
    return f"{count:,.3g} {units[0]}"


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    """Draw bytes relative to the causal-only fetch over the number of ranks, with axes for each table."""
    tables = answer["tables"]
    figure, parts = new_figure(len(tables), width=4.2, height=3.9)
    for axes, table in zip(parts, tables, strict=True):
        ranks = [row["ranks"] for row in table["rows"]]
        lines = [("ring", BASELINE_COLOUR, ":"), ("bound", BASELINE_COLOUR, "--")]
        lines += [("fetch", COLOURS[1], "-"), ("ship", COLOURS[2], "-"), ("auto", COLOURS[0], "-")]
        random = [row["random_auto"] / row["causal_fetch"]["mean"] for row in table["rows"]]
        axes.plot(ranks, random, ":", color=COLOURS[0], label="auto, random routes")
        for name, colour, style in lines:
            shares = [row[name]["mean"] / row["causal_fetch"]["mean"] for row in table["rows"]]
            wide = {"linewidth": 2.6 if name == "auto" else 1.4}
            axes.plot(ranks, shares, style, marker="o", markersize=3, color=colour, label=name, **wide)
        axes.axhline(_QUARTER, color="#b0b4ba", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.set_yticks([2.0**power for power in range(-6, 4)], [_fraction(power) for power in range(-6, 4)])
        axes.set_ylim(2.0**-6.5, 2.0**3.5)
        axes.set_title(f"{table['run']}, {table['length']:,} tokens", fontsize=9)
        axes.set_xlabel("region ranks")
    parts[0].set_ylabel("bytes of a rank, causal-only fetch = 1")
    parts[0].legend(loc="lower left", frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def _fraction(power: int) -> str:
    return f"1/{2**-power}" if power < 0 else str(2**power)
