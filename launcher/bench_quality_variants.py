"""The variants of `biroute bench quality`, as changes of a configuration. No torch here."""

from __future__ import annotations

from typing import Any

from biroute.configs.errors import UserError
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig

_BASE = ("dense", "local", "token", "token-fine", "block", "region")
_WITH_DENSE_LAYER = ("local", "token", "block", "region")
VARIANTS = (*_BASE, *(f"{name}-dense0" for name in _WITH_DENSE_LAYER))


def variant_config(config: RunConfig, name: str, seed: int, steps: int) -> RunConfig:
    """`config` as one plain CPU process would train it under a variant, with the seed for weights and data.

    token: a route for each token, with the configuration's regions; token-fine: regions a quarter of that size, four
    times as many of them; block: a route for every four tokens; region: one for each region; local, dense as they
    say. `-dense0`: the first layer is dense. All but dense see the same number of tokens.

    Raises:
        UserError: the configuration's regions are no multiple of 8 tokens.
    """
    base, _, dense_first = name.partition("-dense")
    region_size, topk = config.model.attention.region_size, config.model.attention.topk
    if region_size % 8:
        raise UserError(f"model.attention.region_size={region_size}: this benchmark needs a multiple of 8")
    change: dict[str, Any] = {"kind": "bi_level", "query_block_size": 1}
    if base in ("dense", "local"):
        change["kind"] = base
    elif base == "token-fine":
        change |= {"region_size": region_size // 4, "topk": 4 * topk}
    elif base == "block":
        change["query_block_size"] = 4
    elif base == "region":
        change["query_block_size"] = region_size
    tree = config.model_dump(mode="json")
    tree["model"]["attention"] |= {**change, "router": "affinity"}
    tree["model"]["dense_layers"] = [0] if dense_first else []
    tree["parallel"] = {"data": 1, "zero_stage": 0}
    tree["train"] |= {"seed": seed, "steps": steps, "precision": "fp32", "device": "cpu"}
    tree["data"]["seed"] = seed
    # A short run would end inside a long run's warm-up.
    tree["optim"]["warmup_steps"] = min(config.optim.warmup_steps, steps // 5)
    return config_from_tree(tree, f"variant {name}")
