"""Where a model's loss lies: by position, on tokens that repeat a bigram, and what far context gives.

Shapes: n targets of a window, N targets that count in all windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.measure import Measure, ratio
from biroute.launcher.evaluate.windows import Window


@dataclass(frozen=True)
class TokenLosses:
    """One entry for each target that counts."""

    nats: np.ndarray  # [N] float64
    position: np.ndarray  # [N] int64: of the last input before it in its window, from 0
    ar_hit: np.ndarray  # [N] bool
    size_bytes: np.ndarray  # [N] int64, of its text in UTF-8
    unit: np.ndarray  # [N] int64: its document or sequence


def ar_hits(tokens: np.ndarray, window: int) -> np.ndarray:
    """Find the tokens that complete a bigram seen earlier, but not within the last `window` tokens.

    Of all places where the bigram stands before, the last one counts: if both of its tokens are among the `window`
    inputs before the target, local attention finds it too, and the target is no hit.

    Source: Arora et al., Zoology (arXiv:2312.04927), section 3: "AR hits", there without regard to distance but
    without the bigrams that are frequent in training.

    Args:
        tokens: int64 [n + 1] of a window.
        window: W, tokens.

    Returns:
        bool [n]: for each target, tokens[1:].
    """
    count = len(tokens) - 1
    keys = tokens[:-1] * (int(tokens.max()) + 1) + tokens[1:]
    order = np.argsort(keys, kind="stable")
    before = np.full(count, -1)
    same = keys[order[1:]] == keys[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return (before >= 0) & (np.arange(count) - before >= window)


def score_windows(
    model: ForwardModel, windows: Sequence[Window], token_bytes: np.ndarray, window: int
) -> TokenLosses:
    """Score every target that counts.

    Args:
        model: the model.
        windows: from `biroute.launcher.evaluate.windows`.
        token_bytes: [vocabulary] int64, UTF-8 bytes of each token.
        window: W of `ar_hits`.
    """
    nats, position, hits, size_bytes, unit = [], [], [], [], []
    for one, losses in zip(windows, model.losses([one.tokens for one in windows]), strict=True):
        counting = slice(one.first, None)
        nats.append(losses[counting])
        position.append(np.arange(len(losses))[counting])
        hits.append(ar_hits(one.tokens, window)[counting])
        size_bytes.append(token_bytes[one.tokens[1:][counting]])
        unit.append(np.full(len(losses) - one.first, one.unit))
    return TokenLosses(*(np.concatenate(parts) for parts in (nats, position, hits, size_bytes, unit)))


def mean_losses(losses: TokenLosses) -> dict[str, Measure]:
    """Return loss and perplexity, bits per byte, loss by position and by AR hit.

    Positions are in powers of two: `position/00064` holds the tokens predicted from positions 64 ... 127, position
    0 being the first input of a window.
    """
    loss = ratio(*_by_unit(losses, losses.nats, np.ones_like(losses.unit)))
    perplexity = math.exp(min(loss.value, 100.0))
    found = {
        "loss": loss,
        "perplexity": Measure(perplexity, perplexity * loss.error, loss.count),
        "bits_per_byte": ratio(*_by_unit(losses, losses.nats / math.log(2), losses.size_bytes)),
    }
    bucket = np.frexp(losses.position)[1]  # 0 for position 0, else 1 + floor(log2)
    for number in np.unique(bucket).tolist():
        first = 1 << number >> 1
        found[f"position/{first:05d}"] = ratio(
            *_by_unit(losses, losses.nats, np.ones_like(losses.unit), bucket == number)
        )
    for name, chosen in (("ar_hits", losses.ar_hit), ("no_ar_hits", ~losses.ar_hit)):
        found[f"loss_on_{name}"] = ratio(*_by_unit(losses, losses.nats, np.ones_like(losses.unit), chosen))
    return found


def far_context(
    model: ForwardModel, windows: Sequence[Window], losses: TokenLosses, *, window: int, most: int
) -> dict[str, Measure]:
    """Compare the loss of tokens with their full context and with the last `window` tokens alone.

    The last tokens are given as a sequence of their own, positions from 0, without anything before them. One forward
    pass of W tokens is needed for each token, so at most `most` tokens of each window are measured, evenly spaced
    among those that count and have more than W tokens of context.

    Returns:
        `full_context_loss`, `window_loss` on the same tokens, and `full_minus_window`, paired: below zero where what
        lies farther than W tokens back helps. Empty if no token has so much context.
    """
    chosen = list(_evenly(windows, window, most))
    rows = [windows[number].tokens[target + 1 - window : target + 2] for number, target in chosen]
    if not rows:
        return {}
    logs = model.next_log_probabilities([row[:-1] for row in rows], [row[-1:].tolist() for row in rows])
    alone = -np.concatenate(list(logs))
    begin = np.cumsum([0] + [len(one.tokens) - 1 - one.first for one in windows])
    full = np.array([losses.nats[begin[number] + target - windows[number].first] for number, target in chosen])
    units = np.array([windows[number].unit for number, _ in chosen])

    def mean(values: np.ndarray) -> Measure:
        return ratio(np.bincount(units, values), np.bincount(units))

    return {"full_context_loss": mean(full), "window_loss": mean(alone), "full_minus_window": mean(full - alone)}


def _evenly(windows: Sequence[Window], window: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (window, target) of the tokens that `far_context` measures."""
    for number, one in enumerate(windows):
        first, end = max(one.first, window), len(one.tokens) - 1
        if first < end:
            for target in np.unique(np.linspace(first, end - 1, min(most, end - first)).round().astype(int)).tolist():
                yield number, target


def _by_unit(
    losses: TokenLosses, total: np.ndarray, size: np.ndarray, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum `total` and `size` of the chosen targets over each unit."""
    at = slice(None) if chosen is None else chosen
    units = int(losses.unit.max()) + 1
    return (
        np.bincount(losses.unit[at], total[at], minlength=units),
        np.bincount(losses.unit[at], size[at], minlength=units),
    )
