"""The variants of `biroute bench quality`, as changes of a configuration. No torch."""

from __future__ import annotations

from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig

_BASE = ("dense", "local", "token", "token-fine", "token-parts", "block", "region")
_WITH_DENSE_LAYER = ("token", "block", "region")
_WITHOUT_SMEAR = ("dense", "token")
VARIANTS = (
    *_BASE,
    *(f"{name}-dense0" for name in _WITH_DENSE_LAYER),
    *(f"{name}-no-smear" for name in _WITHOUT_SMEAR),
)


def variant_config(config: RunConfig, name: str, seed: int, steps: int) -> RunConfig:
    """Change a configuration to a variant that is trained in a single CPU process.

    token: a route for each token, with the configuration's regions and one descriptor for each; token-fine: regions a
    quarter of that size, and four times as many of them; token-parts: four descriptors for each region; block: a
    route for every four tokens; region: a route for each region; local: a sliding window; dense: dense attention.
    With `-dense0`, the first layer is dense. All variants smear keys, except with `-no-smear`. All variants except
    dense see the same number of tokens.

    Args:
        config: the configuration.
        name: name of the variant.
        seed: seed of the weights and of the data.
        steps: optimizer steps.

    Raises:
        UsageError: the configuration's region size is not a multiple of 8 tokens.
    """
    region_size, topk = config.model.attention.region_size, config.model.attention.topk
    if region_size % 8:
        raise UsageError(f"model.attention.region_size={region_size}: this benchmark needs a multiple of 8")
    base = name.removesuffix("-no-smear").removesuffix("-dense0")
    changes: dict[str, dict[str, Any]] = {
        "dense": {"kind": "dense"},
        "local": {"kind": "sliding_window"},
        "token": {},
        "token-fine": {"region_size": region_size // 4, "topk": 4 * topk},
        "token-parts": {"descriptors_per_region": 4},
        "block": {"query_block_size": 4},
        "region": {"query_block_size": region_size},
    }
    same = {"kind": "bi_level", "query_block_size": 1, "descriptors_per_region": 1, "router": "affinity"}
    tree = config.model_dump(mode="json")
    tree["model"]["attention"] |= {**same, **changes[base]}
    tree["model"] |= {"dense_layers": [0] if "-dense0" in name else [], "key_smear": "-no-smear" not in name}
    tree["parallel"] = {"data": 1, "zero_stage": 0}
    tree["train"] |= {"seed": seed, "steps": steps, "precision": "fp32", "device": "cpu"}
    tree["data"]["seed"] = seed
    # The warm-up of a long run could be longer than this short run.
    tree["optim"]["warmup_steps"] = min(config.optim.warmup_of(steps), steps // 5)
    return config_from_tree(tree, f"variant {name}")
