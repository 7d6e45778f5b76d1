"""Losses and log-probabilities from the forward pass of training, for token sequences of any lengths.

Shapes: B sequences, S tokens of the longest, C hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biroute.configs.schema import RunConfig
from biroute.launcher.evaluate.ranks import EvaluationRanks
from biroute.model.language_model import LayerSequence

_BATCH_TOKENS = 8192  # of one forward pass, its padding included
_LOGITS = 1 << 25  # at a time: 128 MiB


class ForwardModel:
    """A causal model as training runs it: no cache, the attention paths of training, whole sequences.

    Several ranks share the batches of a call, which all of them make with the same arguments.
    """

    def __init__(self, layers: LayerSequence, config: RunConfig, ranks: EvaluationRanks | None = None) -> None:
        """Take the layers of `config`'s model as they are, on their device and in their precision."""
        self.ranks = ranks or EvaluationRanks()
        self.layers, self.model, self.vocabulary = layers.eval(), config.model, config.padded_vocab_size
        self.device = next(layers.parameters()).device

    @torch.no_grad()
    def losses(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the cross-entropy of each token of a row but the first, given those before it in the row.

        As in training it is over the padded vocabulary, whose rows without a token are part of the model.

        Args:
            rows: int64 [n + 1] each, 1 <= n <= `sequence_length`.

        Yields:
            float64 [n] in nats, for each row.

        Raises:
            ValueError: a row is too short or too long.
        """
        if not rows:
            return
        found, begin = np.zeros(sum(len(row) - 1 for row in rows)), 0
        for number, batch in enumerate(self._batches(rows, targets=1)):
            size = sum(len(row) - 1 for row in batch)
            if self.ranks.mine(number):
                found[begin : begin + size] = np.concatenate(list(self._losses_of(batch)))
            begin += size
        yield from np.split(self.ranks.join(found), np.cumsum([len(row) - 1 for row in rows])[:-1])

    @torch.no_grad()
    def next_log_probabilities(
        self, rows: Sequence[np.ndarray], tokens: Sequence[Sequence[int]]
    ) -> Iterator[np.ndarray]:
        """Yield the log-probabilities of some tokens after each row.

        Args:
            rows: int64 [n] each, 1 <= n <= `sequence_length`.
            tokens: which ones, for each row.

        Yields:
            float64 [number of its tokens] for each row.
        """
        if not rows:
            return
        found, first, begin = np.zeros(sum(map(len, tokens))), 0, 0
        for number, batch in enumerate(self._batches(rows, targets=0)):
            wanted = tokens[first : first + len(batch)]
            size = sum(map(len, wanted))
            if self.ranks.mine(number):
                logs_BV = self._next_of(batch)
                found[begin : begin + size] = np.concatenate(
                    [log[list(some)] for log, some in zip(logs_BV, wanted, strict=True)]
                )
            first, begin = first + len(batch), begin + size
        yield from np.split(self.ranks.join(found), np.cumsum([len(some) for some in tokens])[:-1])

    def _losses_of(self, batch: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        hidden_SBC = self._hidden([row[:-1] for row in batch])
        losses_SB = np.zeros(hidden_SBC.shape[:2])
        labels_SB = self._padded([row[1:] for row in batch], hidden_SBC.shape[0]).t()
        chunk = max(1, _LOGITS // (hidden_SBC.shape[1] * self.vocabulary))
        for first in range(0, hidden_SBC.shape[0], chunk):
            part = slice(first, first + chunk)
            logits_SBV = self.layers.logits(hidden_SBC[part]).float()
            found = F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB[part].flatten(), reduction="none")
            losses_SB[part] = found.double().cpu().numpy().reshape(losses_SB[part].shape)
        for column, row in enumerate(batch):
            yield losses_SB[: len(row) - 1, column]

    def _next_of(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """Return the log-probabilities [B, V] of the token after each row."""
        hidden_SBC = self._hidden(batch)
        lasts = torch.tensor([len(row) - 1 for row in batch], device=self.device)
        last_1BC = hidden_SBC[lasts, torch.arange(len(batch), device=self.device)][None]
        return np.asarray(self.layers.logits(last_1BC)[0].double().log_softmax(-1).cpu().numpy())

    def _batches(self, rows: Sequence[np.ndarray], targets: int) -> Iterator[list[np.ndarray]]:
        """Yield rows in their order, as many at a time as fit into one forward pass."""
        batch: list[np.ndarray] = []
        longest = 0
        for row in rows:
            inputs = len(row) - targets
            if not 1 <= inputs <= self.model.sequence_length:
                raise ValueError(f"{inputs} tokens: a sequence has 1 ... {self.model.sequence_length}")
            longest = max(longest, self._whole(inputs))
            if batch and longest * (len(batch) + 1) > _BATCH_TOKENS:
                yield batch
                batch, longest = [], self._whole(inputs)
            batch.append(row)
        if batch:
            yield batch

    def _whole(self, tokens: int) -> int:
        return -(-tokens // self.model.attention.region_size) * self.model.attention.region_size

    def _hidden(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Return [S, B, C]. Rows are padded at their ends to whole regions: no token sees a later one."""
        return self.layers.hidden_states(self._padded(rows, self._whole(max(map(len, rows)))))

    def _padded(self, rows: Sequence[np.ndarray], length: int) -> Tensor:
        padded_BS = np.zeros((len(rows), length), dtype=np.int64)
        for padded, row in zip(padded_BS, rows, strict=True):
            padded[: len(row)] = row
        return torch.from_numpy(padded_BS).to(self.device)
