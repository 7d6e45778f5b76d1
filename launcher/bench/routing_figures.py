"""The figures of docs/routing.md: a map of routes, the leak of mean queries, and the cost of region sizes.

Legend: B batch, H query heads, G key/value heads, S tokens, D head size, L region size, R regions, N query blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biroute.configs.load import config_from_tree
from biroute.launcher.bench.recall.masked_attention import route_mask
from biroute.launcher.bench.recall.measure import VARIANTS, RecallSettings, train_variant
from biroute.launcher.bench.recall.model import RecallCore, RecallModel, Variant
from biroute.launcher.bench.recall.task import RecallBatch
from biroute.launcher.bench.report import COLOURS, make_folder
from biroute.launcher.track.figures import new_figure, save_figure
from biroute.model.attention.bi_level import bi_level_attention
from biroute.model.attention.routing import key_descriptors, query_descriptors, route_regions, select_regions
from biroute.model.attention.rule import RouteRule
from biroute.model.flops import attended_pairs, routing_flops

MAP_SEED, LEAK_SEED = 77, 0


def draw_pictures(folder: Path, steps: int) -> dict[str, Any]:
    """Draw all three figures into `folder` and return the numbers that they show.

    Raises:
        UsageError: the folder cannot be created.
    """
    make_folder(folder)
    return {
        "route map": draw_route_map(folder / "route_map.png", steps),
        "leak": draw_leak(folder / "mean_query_leak.png"),
        "cost": draw_cost(folder / "region_size_cost.png"),
    }


# The route map


def draw_route_map(path: Path, steps: int) -> dict[str, float]:
    """Draw the routes that both layers of a model trained on recall choose for one sequence.

    Returns:
        For each layer, the fraction of questions whose route (of any key/value head) contains the region with the
        answer; and the fraction that the model answers correctly.
    """
    variant, settings = VARIANTS["token-4x8-parts4"], RecallSettings(steps=steps)
    model = train_variant(variant, 0, settings)
    batch = settings.task.batch(1, MAP_SEED)
    routes = [_route_of(attention, model, batch) for attention in model.cores()]
    figure, axes = new_figure(len(routes), width=4.6, height=4.9)
    found = {}
    for layer, (one, route_GNK) in enumerate(zip(axes, routes, strict=True)):
        share = _draw_map(one, route_GNK, batch, variant)
        one.set_title(f"layer {layer}: route holds the answer for {share:.0%} of the questions", fontsize=8.5)
        found[f"answer routed, layer {layer}"] = share
    answered = model.logits(batch.tokens, batch.position).argmax(-1) == batch.answer
    found["answered"] = float(answered.float().mean())
    save_figure(figure, path)
    return found


@torch.no_grad()
def _route_of(attention: RecallCore, model: RecallModel, batch: RecallBatch) -> Tensor:
    """Return the route [G, N, K] that this layer chooses for the only sequence of the batch."""
    seen: list[Tensor] = []
    attention.on_route = lambda _, route: seen.append(route)
    try:
        model(batch.tokens)
    finally:
        attention.on_route = None
    return seen[0][0]


def _draw_map(axes: Any, route_GNK: Tensor, batch: RecallBatch, variant: Variant) -> float:
    """Draw routes by token (down) and region (across), with a ring at each answer.

    Returns:
        The fraction of questions whose route contains the answer.
    """
    num_tokens, size = batch.tokens.shape[1], variant.region_size
    mask_GSS = route_mask(
        route_GNK[None], num_tokens=num_tokens, region_size=size, query_block_size=variant.query_block_size
    )[0]
    routed_SR = mask_GSS.any(0).unflatten(1, (-1, size)).any(-1)
    region_R, token_S = torch.arange(routed_SR.shape[1]), torch.arange(num_tokens)
    near_SR = (token_S[:, None] // size - region_R).clamp(min=0) <= 1
    shade_SR = routed_SR.float() * torch.where(near_SR, 0.25, 1.0)
    axes.imshow(shade_SR.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    asked_Q = batch.position[0]
    # The value is one token after the key.
    answer_Q = (asked_Q - batch.distance[0] + 1) // size
    hit_Q = routed_SR[asked_Q, answer_Q]
    for hit, colour in ((True, COLOURS[2]), (False, COLOURS[1])):
        chosen = hit_Q == hit
        axes.scatter(
            answer_Q[chosen], asked_Q[chosen], s=26, facecolors="none", edgecolors=colour, linewidths=1.1,
            label="answer, in the route" if hit else "answer, missed",
        )  # fmt: skip
    axes.set_xlabel(f"region of {size} tokens")
    axes.set_ylabel("query token")
    axes.grid(False)
    axes.legend(frameon=True, fontsize=7, loc="upper right")
    return float(hit_Q.float().mean())


# The leak of a mean query


def causal_outputs(q: Tensor, k: Tensor, v: Tensor, rule: RouteRule, mean_query: bool) -> Tensor:
    """Causal routed attention [B, H, S, D] that routes each query block by its mean query or by its first query.

    The mean query is that of BiFormer (CVPR 2023); in a causal model it makes a block's first token depend on its
    last.
    """
    size, lq = rule.region_size, rule.query_block_size
    if mean_query:
        queries_BGND = query_descriptors(q, k.shape[1], rule.query_block_size, causal=False)
        keys_BGRD = key_descriptors(k, rule.region_size)
        own_N = torch.arange(queries_BGND.shape[2]) * rule.query_block_size // rule.region_size
        route = select_regions(queries_BGND @ keys_BGRD.transpose(2, 3), own_N, rule)
    else:
        route = route_regions(q, k, rule)
    return bi_level_attention(q, k, v, route, region_size=size, query_block_size=lq, causal=True)


def leak(num_tokens: int, rule: RouteRule, mean_query: bool) -> tuple[Tensor, list[float]]:
    """Replace all tokens from t on by new random ones, for every t from 1, and compare the outputs before t.

    Returns:
        The largest change of each output before t, [S - 1, S] (0 from t on), and the largest of those for each t.
    """
    generator = torch.Generator().manual_seed(LEAK_SEED)
    q, k, v = torch.randn(3, 1, 1, num_tokens, 16, generator=generator)
    before = causal_outputs(q, k, v, rule, mean_query)
    rows, largest = [], []
    for cut in range(1, num_tokens):
        later = torch.stack([q, k, v])
        later[:, :, :, cut:] = torch.randn(later[:, :, :, cut:].shape, generator=generator)
        after = causal_outputs(later[0], later[1], later[2], rule, mean_query)
        change_S = (after - before).abs().amax((0, 1, 3))
        change_S[cut:] = 0.0
        rows.append(change_S)
        largest.append(float(change_S.max()))
    return torch.stack(rows), largest


def draw_leak(path: Path, num_tokens: int = 64) -> dict[str, dict[str, float]]:
    """Draw how outputs before token t change with the tokens from t on; returns how often, and the largest change."""
    rule = RouteRule(region_size=8, query_block_size=8, topk=3, causal=True)
    figure, axes = new_figure(2, width=4.8, height=4.2)
    found, panels = {}, ((True, "mean query of the block"), (False, "query of the block's first token"))
    results = {name: leak(num_tokens, rule, mean_query) for mean_query, name in panels}
    top = max(max(largest) for _, largest in results.values()) or 1.0
    for one, (name, (change_tS, largest)) in zip(axes, results.items(), strict=True):
        wrong = sum(value > 0 for value in largest)
        image = one.imshow(
            change_tS.numpy(),
            aspect="auto",
            cmap="Reds",
            vmin=0,
            vmax=top,
            interpolation="nearest",
            extent=(-0.5, num_tokens - 0.5, num_tokens - 0.5, 0.5),
        )
        one.set_title(
            f"{name}:\n{wrong} of {len(largest)} changes of the future reach the past, by up to {max(largest):.2f}",
            fontsize=8.5,
        )
        one.set_xlabel("token whose output is compared")
        one.set_ylabel("first changed token")
        one.grid(False)
        found[name] = {"changes": len(largest), "reach the past": wrong, "largest": max(largest)}
    figure.colorbar(image, ax=axes, label="largest change of an output before the changed tokens")
    save_figure(figure, path)
    return found


# The cost of region sizes


def draw_cost(path: Path, num_tokens: int = 16_384, seen_tokens: int = 512) -> dict[str, dict[int, float]]:
    """Draw a layer's operations (forward and backward, dense = 1) over the region size, at equal tokens seen."""
    sizes = [2**power for power in range(2, 9)]
    figure, (axes,) = new_figure(1, width=5.6)
    dense = _layer_flops(num_tokens, {"kind": "dense"})[0]
    found: dict[str, dict[int, float]] = {}
    kinds = {  # by region size: query block size, descriptors
        "a route for each token": lambda size: (1, 1),
        "the same, a descriptor for every 4 keys": lambda size: (1, size // 4),
        "one for each region": lambda size: (size, 1),
    }
    for colour, (name, kind) in zip(COLOURS, kinds.items(), strict=False):
        costs = []
        for size in sizes:
            block, parts = kind(size)
            route = {"region_size": size, "topk": seen_tokens // size}
            route |= {"query_block_size": block, "descriptors_per_region": parts}
            costs.append(tuple(part / dense for part in _layer_flops(num_tokens, route)))
        totals = [attention + routing for attention, routing in costs]
        axes.plot(sizes, totals, marker="o", markersize=3, color=colour, label=f"{name}: both levels")
        axes.plot(sizes, [routing for _, routing in costs], "--", color=colour, label=f"{name}: routing alone")
        found[name] = dict(zip(sizes, totals, strict=True))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_yticks(list(np.logspace(-4, 0, 5)))
    axes.set_xlabel(f"region size L ({seen_tokens} of {num_tokens:,} tokens seen)")
    axes.set_ylabel("operations, dense causal = 1")
    axes.legend(frameon=False, fontsize=7.5)
    save_figure(figure, path)
    return found


def _layer_flops(num_tokens: int, attention: dict[str, Any]) -> Sequence[float]:
    """Count operations of one layer with H=8, G=2, D=64: attention (forward and backward), routing (forward only)."""
    model = {
        "hidden_size": 512, "num_heads": 8, "num_kv_heads": 2, "num_layers": 1, "sequence_length": num_tokens,
        "attention": attention,
    }  # fmt: skip
    config = config_from_tree({"model": model}, "picture")
    query_size = config.model.num_heads * config.model.head_size
    return 3 * 4 * attended_pairs(config, 0) * query_size, routing_flops(config, 0)
