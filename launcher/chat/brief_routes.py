"""The routes of an answer in a few lines: which regions were read for it, and how their text begins."""

from __future__ import annotations

from collections import Counter

from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.launcher.chat.conversation import Answer
from biroute.launcher.routes.record import read_routes
from biroute.launcher.routes.report import pieces
from biroute.model.decode.cached_model import CachedModel

_LINES, _CHARACTERS = 8, 48


def brief_routes(model: CachedModel, tokenizer: Tokenizer, answer: Answer) -> list[str]:
    """Return lines to print: the regions that were read most for an answer.

    Left out is what nobody chose: each token's own region and the one before it.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        answer: the last one.
    """
    size, tokens = model.model.attention.region_size, (*answer.prompt, *answer.tokens)
    # The token before a token of the answer is the one that read for it.
    asking = range(len(answer.prompt) - 1, len(tokens) - 1)
    reads, chances = Counter[int](), 0
    for layer in read_routes(model, tokens[: model.model.sequence_length]):
        if layer.route is None:
            continue
        for route_NK in layer.route.tolist():
            for token in asking:
                own = token // size
                reads.update(one for one in route_NK[token // layer.query_block_size] if 0 <= one < own - 1)
            chances += len(asking)
    if not reads:
        return ["(nothing was read but each token's own region and the one before it, or everything)"]
    text = pieces(tokens, tokenizer)
    lines = ["read for the answer, by so many of its tokens, layers and heads:"]
    for region, count in sorted(reads.items(), key=lambda pair: (-pair[1], pair[0]))[:_LINES]:
        beginning = " ".join("".join(text[region * size : (region + 1) * size]).split())
        lines.append(f"{count / chances:6.0%}  region {region:<4d} {beginning[:_CHARACTERS]}")
    rest = len(reads) - _LINES
    return [*lines, f"        and {rest} more"] if rest > 0 else lines
