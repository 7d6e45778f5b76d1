"""The routes of a text: those that the trained model chooses in its own forward pass.

Shapes: S tokens of the text, G key/value heads, N query blocks, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from biroute.model.attention.rule import RouteRule
from biroute.model.decode.cached_model import CachedModel


@dataclass(frozen=True)
class LayerRoutes:
    """What one layer reads.

    Attributes:
        layer: its number, from 0.
        kind: bi_level, sliding_window or dense.
        query_block_size: tokens that share a route.
        rule: how a bi_level layer chooses; None for other kinds.
        route: int64 [G, N, K] regions, ascending, -1 = empty, on the CPU; None in a dense layer.
    """

    layer: int
    kind: str
    query_block_size: int
    rule: RouteRule | None
    route: Tensor | None


def read_routes(model: CachedModel, tokens: Sequence[int]) -> list[LayerRoutes]:
    """Run the model over a text as over a prompt, and keep the routes.

    Args:
        model: the trained model.
        tokens: 1 ... `sequence_length` of them.

    Returns:
        The routes of all layers, those of the blocks that hold a token of the text.

    Raises:
        ValueError: there is no token, or there are too many.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int, route: Tensor) -> None:
        found[layer] = route[0].cpu().clone()

    before = [core.on_route for core in model.cores]
    try:
        for core in model.cores:
            core.on_route = keep
        model.prefill(tokens)
    finally:
        for core, on_route in zip(model.cores, before, strict=True):
            core.on_route = on_route
    layers = []
    for core in model.cores:
        route_GNK = found.get(core.layer)
        # The forward pass is padded to whole regions; no token of the text sees the padding.
        blocks = -(-len(tokens) // core.query_block_size)
        kept_GNK = None if route_GNK is None else route_GNK[:, :blocks]
        layers.append(LayerRoutes(core.layer, core.kind, core.query_block_size, core.rule, kept_GNK))
    return layers
