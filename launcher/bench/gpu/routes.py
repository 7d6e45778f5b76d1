"""Routes for measurements of the kernels: those that a trained model chooses for real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.launcher.bench.report import say
from biroute.launcher.generate.trained import ModelChoice, open_trained
from biroute.model.attention.routing import route_regions
from biroute.model.attention.rule import RouteRule


def trained_routes(
    run: Path, text: Path, tokens: int, blocks: Sequence[int], *, region_size: int, topk: int, heads: int
) -> dict[int, Tensor]:
    """Let a trained model read a long text, and choose regions from its queries and keys, layer by layer.

    Causal routes of the first tokens are those of a shorter sequence.

    Args:
        run: folder of a trained run whose regions have `region_size` tokens.
        text: a text file.
        tokens: how many of its tokens are read.
        blocks: tokens of a query block, for each of which a route is chosen.
        region_size: L.
        topk: K regions of a route.
        heads: G key/value heads; the model's, of all layers, must be that many.

    Returns:
        Routes int32 [1, G, tokens // Lq, K] on the CPU, by tokens of a query block Lq.

    Raises:
        UsageError: the text is too short, or the run has other regions or too few heads.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {text}: {error}; name a file of UTF-8 text") from None
    trained = open_trained(ModelChoice(run=run))
    words = trained.tokenizer.encode(content)
    if len(words) < tokens:
        raise UsageError(f"--text {text}: {len(words)} tokens; a text of {tokens} is needed")
    found: dict[int, list[Tensor]] = {block: [] for block in blocks}
    for core in trained.model.cores:
        if core.rule is None or core.rule.region_size != region_size:
            raise UsageError(f"--run {run}: layer {core.layer} has no regions of {region_size} tokens")

        def choose(q: Tensor, k: Tensor, core: Any = core) -> Tensor:
            for block in blocks:
                rule = RouteRule(
                    region_size, block, topk, True, descriptors_per_region=core.rule.descriptors_per_region
                )
                found[block].append(route_regions(q, k, rule).int().cpu())
            say(f"layer {core.layer}: routed")
            return route_regions(q, k, core.rule)

        core.router = choose
    with torch.no_grad():
        trained.model.layers.hidden_states(torch.tensor([words[:tokens]], device=trained.model.device))
    routes = {block: torch.cat(of_layers, 1)[:, :heads] for block, of_layers in found.items()}
    if (number := routes[blocks[0]].shape[1]) < heads:
        raise UsageError(f"--run {run}: {number} key/value heads in all layers; {heads} are needed")
    return routes
