"""Tables, page and picture of `biroute bench exchange`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biroute.launcher.bench.report import (
    BASELINE_COLOUR,
    COLOURS,
    facts_list,
    make_folder,
    markdown_table,
    new_figure,
    print_table,
    save_figure,
)

PAGE_NAME, PICTURE_NAME = "exchange.md", "exchange.png"
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

- *causal-only fetch*: keys and values of all earlier ranks; *ring*: of all other ranks, as a ring or an all-gather
  moves them; *bound*: the most that any route of this form could make the chosen plan move.
- *descriptors*: gathered whatever is routed, to choose the routes; in addition to what the other columns hold.
- *fetch*, *ship*, *auto*: all routed regions fetched, all queries shipped, or the cheaper of the two for each pair of
  ranks, sequence and key/value head. *Shipped*: the share of those that ship.
- *auto / causal-only*: what the chosen plan moves of the causal-only fetch; *with random routes*: the same for
  these weights under a random router. What lies between comes of routes that concentrate on a few regions. Where the
  loss under a random router is hardly higher, the router has not learned much yet, and a sharper one may spread more:
  take the random routes as the careful estimate.
- *worst rank*: who receives most under auto, and how much more than the mean; *hottest sender*: who sends most.
"""


def print_exchange(answer: Mapping[str, Any]) -> None:
    """The tables in the terminal."""
    for table in answer["tables"]:
        print_table(_title(table), _HEADER, _rows(table))
    if answer["measured"]:
        print_table("measured on real ranks", _MEASURED_HEADER, _measured_rows(answer))


def write_exchange(answer: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write page and picture into `folder`; their paths. Raises UsageError if it cannot be created."""
    make_folder(folder)
    page, picture = folder / PAGE_NAME, folder / PICTURE_NAME
    _draw(answer, picture)
    settings, model = answer["settings"], answer["settings"]["model"]
    parts = [
        _INTRODUCTION.format(
            layers=model["num_layers"], heads=model["num_heads"], groups=model["num_kv_heads"],
            head=model["head_size"], precision=settings["precision"], sequences=settings["sequences"],
        ),
        facts_list({**answer["environment_info"], **_training(answer)}),
        f"![Bytes relative to the causal-only fetch]({PICTURE_NAME})",
    ]  # fmt: skip
    for table in answer["tables"]:
        parts += [f"## {_title(table)}", markdown_table(_HEADER, _rows(table)), _verdict(table)]
    if answer["measured"]:
        parts += [_MEASURED_TEXT, markdown_table(_MEASURED_HEADER, _measured_rows(answer))]
    page.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", encoding="utf-8")
    return [page, picture]


def _training(answer: Mapping[str, Any]) -> dict[str, str]:
    """How long each run has trained, and how it does on the text that was routed."""
    facts: dict[str, str] = {}
    for table in answer["tables"]:
        loss, random_loss = table["nats_per_token"]
        facts.setdefault(  # of several lengths the first one counts
            f"run {table['run']}",
            f"{table['trained_steps']:,} steps of {table['tokens_per_step']:,} tokens, sequences of "
            f"{table['trained_length']:,}; {loss:.3f} nats per token here, {random_loss:.3f} under a random router",
        )
    return facts


_MEASURED_TEXT = """\
## Measured on real ranks

Forward and backward of one sequence on gloo processes of this machine. *Payload*: what forward moved in routed
layers, all ranks together, as counted at the collectives and as the ranks' plans foresaw. *Plan of one process*:
from the route of a single process; it may differ in the few choices whose affinities are equal within rounding.
*Received in all*: everything, backward, requests and descriptors included. *Waiting*: the share of the pass that the
slowest rank stood waiting for others; processes that share cores wait for each other's arithmetic as well.
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
    """What the chosen plan comes to at 64 ranks, measured; and if it is more than a quarter, what keeps it there."""
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
    """Bytes for people."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1000 and len(units) > 1:
        count, _ = count / 1024, units.pop(0)
    return f"{count:,.3g} {units[0]}"


def _draw(answer: Mapping[str, Any], path: Path) -> None:
    """Bytes relative to the causal-only fetch over the number of ranks, one part for each table."""
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
