"""Write docs/benchmarks/scaling.md and scaling.png, an 8B model on 8 to 1,024 GPUs on paper: `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.communication import ASSUMED_EXCHANGE
from biroute.launcher.plan.figure import COLOURS
from biroute.launcher.plan.hardware import GIB, load_hardware
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.search import search_layouts
from biroute.launcher.plan.step_time import binding_resource
from biroute.launcher.track.figures import new_figure, save_figure

FOLDER = Path(__file__).resolve().parent / "benchmarks"
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "routed": {"region_size": 512, "query_block_size": 64, "topk": 16, "descriptors_per_region": 1},
}
INTRODUCTION = """# On paper: an 8B model at 131,072 tokens on 8 to 1,024 GPUs

Made by `docs/write_scaling_page.py` with the search of `biroute plan --search`; do not edit. **Every number on
this page is predicted; nothing was run.** How: [plan.md](../plan.md); how near such predictions come to public
runs of dense models: [plan.md](plan.md). For routed attention there is no public run to compare with.

The model is that of Llama 3 8B (hidden size 4,096, 32 layers, 32 query heads in 8 key/value heads, an MLP of
14,336, a vocabulary of 128,256; Llama Team 2024, arXiv:2407.21783, table 3) in bf16, with sequences of 131,072
tokens and 128 of them in each step, 16.8 million tokens, at every size. *Dense*: causal attention to all tokens.
*Routed*: regions of 512 tokens, one route for each 64 queries, 16 regions, so that a query sees 8,192 tokens. The
node is that of `configs/hardware/h100.yaml`: eight H100, 400 Gbit/s for each. For each size the fastest layout
that fits is shown.
"""
READING = """## What binds, and what that stands on

- *Dense* attention is most of the step, and the same share of it at every size: adding data ranks divides the
  work and what a rank computes stays as it is. So its efficiency is flat until the batch has too few sequences
  for the data ranks; then sequences are shared by region ranks, of which the last computes up to twice the mean.
- *Routed* attention takes an eighth of dense attention's operations here, so matrix products and what travels
  take the larger share. At 8 GPUs the weights and their states leave so little memory that all blocks are
  recomputed; with more ranks that ends, so the rate of a GPU *rises* by a third up to 64 GPUs, and then stays.
- Routed attention is counted at dense attention's rate. Its kernels were not measured on a GPU
  ([gpu.md](../gpu.md)): at half that rate, the attention part of the routed columns doubles.
- Region ranks exchange 0.4 of the bound of any route, as trained runs did at 2 to 64 ranks; at 128 and 256 they
  moved 0.50 to 0.66 of it ([exchange.md](exchange.md)), so layouts with more than 64 region ranks are told too
  well.
- There is no contention, no straggler and no restart on paper, and links have no latency: the profile has none.
  All of these grow with the number of GPUs.
"""


def configuration(kind: str) -> RunConfig:
    """The model with one kind of attention."""
    tree: dict[str, Any] = {
        "model": {
            "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 14336,
            "sequence_length": 131072, "tied_embeddings": False, "attention": ATTENTION[kind],
        },
        "data": {"tokenizer": {"vocab_size": 128256}},
        "train": {
            "global_batch_size": 128, "microbatch_size": 1, "evaluate_sequences": 128, "precision": "bf16",
        },
    }  # fmt: skip
    return config_from_tree(tree, "docs/write_scaling_page.py")


def best(kind: str, devices: int) -> Plan:
    """The fastest layout that fits."""
    return search_layouts(configuration(kind), devices, load_hardware("h100"), ASSUMED_EXCHANGE).plans[0]


def row(devices: int, plan: Plan, first: Plan) -> str:
    """A line of the table."""
    layout, resource, share = plan.layout, *binding_resource(plan.step)
    rate, alone = plan.tokens_per_second / devices, first.tokens_per_second / first.layout.world_size
    extra = [f"ZeRO {layout.zero_stage}"]
    extra += ["recomputed"] if plan.config.train.activation_checkpointing else []
    extra += ["sequence parallel"] if plan.config.parallel.sequence_parallel else []
    cells = [
        f"{devices:,}", f"{layout.tensor} x {layout.region} x {layout.data} x {layout.pipe}", ", ".join(extra),
        f"{plan.memory.total / GIB:.1f}", f"{plan.step.total:.2f}", f"{rate:,.0f}", f"{plan.mfu:.0%}",
        f"{rate / alone:.0%}", f"{resource} {share:.0%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(plans: list[Plan]) -> str:
    """The sizes of one kind."""
    header = [
        "GPUs", "tensor x region x data x pipeline", "with", "GiB of a GPU, predicted", "step s, predicted",
        "tokens/s of a GPU, predicted", "MFU, predicted", "of the rate at 8, predicted", "binds, predicted",
    ]  # fmt: skip
    rule = ["--:", "---", "---", *["--:"] * 5, "---"]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(rule) + " |"]
    return "\n".join([*lines, *(row(n, plan, plans[0]) for n, plan in zip(DEVICES, plans, strict=True))])


def draw(plans: dict[str, list[Plan]]) -> None:
    """Rates, and the time of a step by part, of both kinds."""
    figure, (rates, *bars) = new_figure(3)
    for (kind, found), colour in zip(plans.items(), COLOURS, strict=False):
        rates.semilogx(
            DEVICES, [plan.tokens_per_second / n for n, plan in zip(DEVICES, found, strict=True)],
            base=2, color=colour, marker="o", label=kind,
        )  # fmt: skip
    rates.set(title="Tokens/s of a GPU, predicted", xlabel="H100 GPUs", ylim=(0, None))
    rates.set_xticks(DEVICES, [str(n) for n in DEVICES])
    rates.legend(frameon=False, fontsize=8)
    for axes, (kind, found) in zip(bars, plans.items(), strict=True):
        base = [0.0] * len(found)
        for part, colour in zip(found[0].step.parts(), COLOURS, strict=False):
            shares = [plan.step.parts()[part] / plan.step.total for plan in found]
            if max(shares) > 0.005:
                axes.bar([str(n) for n in DEVICES], shares, bottom=base, color=colour, label=part, width=0.7)
                base = [low + share for low, share in zip(base, shares, strict=True)]
        axes.set(
            title=f"Shares of a step, {kind}, predicted",
            xlabel="H100 GPUs",
            xlim=(-0.6, len(found) + 3.2),
            ylim=(0, 1),
        )
        axes.legend(frameon=False, fontsize=6.5, loc="upper right")
    save_figure(figure, FOLDER / "scaling.png")


def main() -> None:
    plans = {kind: [best(kind, devices) for devices in DEVICES] for kind in ATTENTION}
    parts = [INTRODUCTION]
    for kind, found in plans.items():
        parts += [f"## {kind.capitalize()}", table(found)]
    parts += ["![tokens/s of a GPU and shares of a step, predicted](scaling.png)", READING]
    (FOLDER / "scaling.md").write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    draw(plans)


if __name__ == "__main__":
    main()
