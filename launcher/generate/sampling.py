"""The next token from logits: a pure function of the logits, the tokens so far, the settings and a number.

Shapes: V tokens of the tokenizer (the padding of the vocabulary is left out).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from biroute.launcher.generate.settings import Settings


class Choice(NamedTuple):
    """A token that was chosen."""

    token: int
    log_probability: float  # natural logarithm, under the model itself: before penalty, temperature and cuts


def uniform_numbers(seed: int, sample: int) -> Iterator[float]:
    """Yield numbers in [0, 1), the same for a seed and a sample whatever else is generated, on any machine.

    A generator of torch would do as well on one machine; a hash has no state that batches could disturb.

    Args:
        seed: of the generation.
        sample: the number of the sample of a prompt, from 0.
    """
    turn = 0
    while True:
        digest = hashlib.sha256(f"biroute sample {seed} {sample} {turn}".encode()).digest()
        yield int.from_bytes(digest[:8], "big") / 2**64
        turn += 1


def log_probabilities(logits_V: Tensor, vocab_size: int) -> Tensor:
    """Return the fp64 log-probabilities of the tokenizer's tokens, [vocab_size], on the CPU.

    One row at a time: what reports log-probabilities then reports the same bits, whatever else is computed.
    """
    return torch.log_softmax(logits_V[:vocab_size].double(), 0).cpu()


def choose_token(logits_V: Tensor, seen: Sequence[int], settings: Settings, uniform: float) -> Choice:
    """Choose the next token.

    Args:
        logits_V: fp32 [V].
        seen: the tokens so far, prompt included: what the repetition penalty is about.
        settings: how to choose.
        uniform: from [0, 1); with the same number the same token comes.

    Returns:
        The token and its log-probability.
    """
    logits_V = logits_V.detach().float().cpu()
    log_probability_V = torch.log_softmax(logits_V.double(), 0)
    penalized_V = _penalize(logits_V, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        token = _likeliest(penalized_V)
    else:
        token = _draw(_cut(_cool(penalized_V, settings.temperature), settings), uniform)
    return Choice(token, float(log_probability_V[token]))


def _likeliest(logits_V: Tensor) -> int:
    # argmax may return any of several equal ones.
    return int((logits_V == logits_V.max()).nonzero()[0])


def _penalize(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    if penalty == 1 or not seen:
        return logits_V
    ids = torch.tensor(sorted(set(seen)))
    found = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(found > 0, found / penalty, found * penalty))


def _cool(logits_V: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; where that passes what fp32 holds, only the likeliest tokens are left."""
    cooled_V = logits_V / temperature
    if math.isfinite(cooled_V.max()):
        return cooled_V
    # Relative to the largest: 0 for that one, and -inf for all others, as the limit of small temperatures is.
    bound = torch.finfo(logits_V.dtype).max
    finite_V = logits_V.clamp(-bound, bound)  # a tiny repetition penalty may have made them infinite
    return (finite_V - finite_V.max()).double() / temperature


def _cut(logits_V: Tensor, settings: Settings) -> Tensor:
    """Return fp64 probabilities [V], 0 for tokens that top-k, top-p or min-p leave out."""
    # Stable: of equal logits the lower id comes first, and is cut last.
    sorted_V, order_V = logits_V.double().sort(descending=True, stable=True)
    keep_V = torch.ones_like(order_V, dtype=torch.bool)
    if settings.top_k:
        keep_V[settings.top_k :] = False
    probability_V = torch.softmax(sorted_V.masked_fill(~keep_V, -torch.inf), 0)
    if settings.top_p < 1:
        # A token stays while those before it do not yet have top_p, so the first always does.
        keep_V &= probability_V.cumsum(0) - probability_V < settings.top_p
    probability_V = torch.softmax(sorted_V.masked_fill(~keep_V, -torch.inf), 0)
    keep_V &= probability_V >= settings.min_p * probability_V[0]
    kept_V = probability_V.masked_fill(~keep_V, 0.0)
    return torch.zeros_like(kept_V).scatter(0, order_V, kept_V)


def _draw(probability_V: Tensor, uniform: float) -> int:
    """Return the token at which the cumulated probability passes `uniform` of the whole."""
    cumulated_V = probability_V.cumsum(0)
    token = int(torch.searchsorted(cumulated_V, uniform * float(cumulated_V[-1]), right=True))
    # Rounding may point behind the last token that has a probability.
    return min(token, int(probability_V.nonzero()[-1]))
