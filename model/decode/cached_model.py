"""A trained model that continues sequences token by token, through the very layers that were trained.

There is no second definition of the model: `CachedModel` walks the modules of `LayerSequence`, and only replaces the
attention of each layer, for the time of a call, by attention over its pages (`attention.py`).

What a sequence gets does not depend on the others in a call, to the bit. A prompt is computed by itself. A step takes
`rows` sequences at a time, always that many, with padding where there are fewer: a matrix product of a fixed shape
gives each row the same bits whatever the other rows hold. Attention takes one sequence at a time.

Shapes: B sequences, S tokens, C hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import AttentionState, CoreAttention
from biroute.model.decode.attention import LayerCache, PromptAttention, TokenAttention
from biroute.model.language_model import LayerSequence

# Sequences of one step. MKL's products of 4 rows have the bits of those of 1,024, as in training; those of 1 and 2
# rows, by another algorithm, do not (tests/unit/model/decode/test_cached_model.py), but 1 row is faster.
ROWS = 4


class CachedSequence:
    """One sequence and what it has left in every layer."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Return the number of tokens so far."""
        return self.layers[0].pages.length

    def size_bytes(self) -> int:
        """Return the bytes of keys, values and descriptors so far."""
        return sum(layer.size_bytes() for layer in self.layers)


class CachedModel:
    """A causal model in one process, its weights loaded."""

    def __init__(self, layers: LayerSequence, model: ModelConfig, *, exact: bool | None = None) -> None:
        """Take the layers as they are, on their device and in their precision.

        Args:
            layers: of the model, with its weights.
            model: its configuration.
            exact: attend in fp64, rounded once (`CoreAttention.attend_exactly`), so that where a prompt ends
                changes no bit; otherwise that holds within rounding, and a CPU is faster. None: on a CPU in fp32.

        Raises:
            ValueError: the model is bidirectional, or its layers share sequences with other ranks.
        """
        self.layers, self.model = layers.eval(), model
        self.cores = [module for module in layers.modules() if isinstance(module, CoreAttention)]
        if not model.causal or any(core.shard is not None for core in self.cores):
            raise ValueError("a cache needs a causal model whose sequences are whole")
        weight = next(layers.parameters())
        self.device = weight.device
        default = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.exact = default if exact is None else exact
        self.rows = 1 if weight.device.type == "cpu" and not self.exact else ROWS

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> tuple[CachedSequence, Tensor]:
        """Begin a sequence with a prompt.

        Args:
            tokens: 1 ... `sequence_length` of them.

        Returns:
            The sequence, and the fp32 logits [V] of the token after the prompt.

        Raises:
            ValueError: there is no token, or there are more than `sequence_length`.
        """
        sequence, hidden_SBC = self._begin(tokens)
        return sequence, self._logits(hidden_SBC[-1:].transpose(0, 1))[0]

    @torch.no_grad()
    def every_logit(self, tokens: Sequence[int], first: int = 0) -> Tensor:
        """Return the fp32 logits after each token of a text: the bits that `prefill` and `step` give.

        Args:
            tokens: of the text, 1 ... `sequence_length` of them.
            first: leave out those after the tokens before this one.

        Returns:
            [S - first, V].

        Raises:
            ValueError: as in `prefill`.
        """
        # In the same groups of rows whatever is left out.
        skipped = first - first % self.rows
        hidden_SBC = self._begin(tokens)[1][skipped:]
        return torch.cat([self._logits(part_B1C) for part_B1C in hidden_SBC.split(self.rows)])[first - skipped :]

    def _begin(self, tokens: Sequence[int]) -> tuple[CachedSequence, Tensor]:
        """Return a new sequence of the tokens, and their hidden states [S, 1, C]."""
        length, size = len(tokens), self.model.attention.region_size
        if not 1 <= length <= self.model.sequence_length:
            raise ValueError(f"{length} tokens: a prompt has 1 ... {self.model.sequence_length}")
        caches = [LayerCache(core) for core in self.cores]
        # At least `ROWS` tokens, or matrix products would be of another kind.
        whole = min(-(-max(length, ROWS) // size) * size, self.model.sequence_length)
        padded = [*tokens, *[0] * (whole - length)]
        with self._attending(lambda layer: PromptAttention(caches[layer], length, self.exact)):
            hidden_SBC = self.layers.hidden_states(torch.tensor([padded], device=self.device))
        return CachedSequence(caches), hidden_SBC[:length]

    @torch.no_grad()
    def step(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        """Add one token to each sequence.

        Args:
            sequences: B different ones, of any lengths below `sequence_length`.
            tokens: one for each.

        Returns:
            The fp32 logits [B, V] of each sequence's next token.

        Raises:
            ValueError: a sequence has `sequence_length` tokens; no sequence is changed.
        """
        pairs = list(zip(sequences, tokens, strict=True))
        longest = self.model.sequence_length
        if any(one.length >= longest for one in sequences):
            raise ValueError(f"a sequence has {longest} tokens, as many as the model takes")
        return torch.cat([self._step(pairs[first : first + self.rows]) for first in range(0, len(pairs), self.rows)])

    def _step(self, pairs: Sequence[tuple[CachedSequence, int]]) -> Tensor:
        tokens = [token for _, token in pairs] + [0] * (self.rows - len(pairs))
        with self._attending(lambda layer: TokenAttention([one.layers[layer] for one, _ in pairs], self.exact)):
            hidden_1BC = self.layers.hidden_states(torch.tensor(tokens, device=self.device)[:, None])
        return self._logits(hidden_1BC[0][:, None])[: len(pairs)]

    def _logits(self, hidden_B1C: Tensor) -> Tensor:
        """Hidden states [B, 1, C] of up to `rows` tokens -> fp32 logits of as many, [B, V]."""
        padding = self.rows - hidden_B1C.shape[0]
        padded_1BC = torch.nn.functional.pad(hidden_B1C.transpose(0, 1), (0, 0, 0, padding))
        return self.layers.logits(padded_1BC)[0, : self.rows - padding].float()

    @contextmanager
    def _attending(self, state_of: Callable[[int], AttentionState]) -> Iterator[None]:
        """Let each layer attend by the state that `state_of` makes for its number."""
        try:
            for layer, core in enumerate(self.cores):
                core.state = state_of(layer)
            yield
        finally:
            for core in self.cores:
                core.state = None
