"""The routes of a text as one object: what `biroute routes --json` prints and what the page shows.

Shapes: G key/value heads, N query blocks, K slots of a route.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from biroute.configs.messages import printable
from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.routes.measures import measure
from biroute.launcher.routes.record import LayerRoutes


def text_report(tokens: Sequence[int], tokenizer: Tokenizer, region_size: int) -> dict[str, Any]:
    """Describe the text.

    Args:
        tokens: of the text.
        tokenizer: the model's.
        region_size: tokens of a region.

    Returns:
        `tokens`, their ids; `pieces`, the text that each adds, control characters spelled: a character that several
        tokens spell belongs to the last of them, and the others add nothing; `region_size` and `num_regions`.
    """
    return {
        "tokens": list(tokens),
        "pieces": pieces(tokens, tokenizer),
        "region_size": region_size,
        "num_regions": -(-len(tokens) // region_size),
    }


def pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the characters that each token completes, with U+FFFD for bytes that are no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = len(tokens) - 1
    return [printable(decoder.decode(tokenizer.decode_bytes([token]), n == last)) for n, token in enumerate(tokens)]


def layers_report(layers: Sequence[LayerRoutes], region_size: int) -> list[dict[str, Any]]:
    """Describe what the layers read.

    Args:
        layers: from `read_routes`.
        region_size: tokens of a region.

    Returns:
        For each layer `layer`, `kind`, `query_block_size`, `measures` (see `Measures`; None if dense) and `heads`;
        for each key/value head `measures` and `routes`, for each query block the regions that it reads, ascending.
    """
    reports = []
    for one in layers:
        report: dict[str, Any] = {"layer": one.layer, "kind": one.kind, "query_block_size": one.query_block_size}
        if one.route is None:
            reports.append({**report, "measures": None, "heads": []})
            continue
        whole, *heads = measure(one.route, one.query_block_size, region_size, one.rule)
        routes = [[[region for region in route if region >= 0] for route in head] for head in one.route.tolist()]
        report["measures"] = asdict(whole)
        report["heads"] = [
            {"measures": asdict(head), "routes": route} for head, route in zip(heads, routes, strict=True)
        ]
        reports.append(report)
    return reports
