"""A trained model that continues sequences token by token, with the weights and the attention that were trained.

`PlainLayers` runs the layers; in place of its attention, each layer attends over its pages (`attention.py`) for the
time of a call.

What a sequence gets does not depend on the others in a call, to the bit. A prompt is computed by itself, and
attention takes one sequence at a time. With exact sums a row has the same bits in any number of rows. Without, a step
takes `rows` sequences at a time, always that many, with padding where there are fewer: a matrix product of a fixed
shape gives each row the same bits whatever the other rows hold.

Shapes: B sequences, S tokens, C hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from biroute.configs.schema import ModelConfig
from biroute.model.attention.core import CoreAttention
from biroute.model.decode.attention import LayerCache, PromptAttention, TokenAttention
from biroute.model.decode.plain_layers import HeadsState, PlainLayers
from biroute.model.language_model import LayerSequence

ROWS = 4  # sequences of one step on a GPU


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
            exact: sum products and attention in fp64 and round once (`biroute.model.exact_sums`), so that where a
                prompt ends changes no bit; otherwise that holds within rounding, with less time and memory. None: on
                a CPU in fp32.

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
        self.rows = None if self.exact else 1 if weight.device.type == "cpu" else ROWS
        self._plain_layers = PlainLayers(layers, exact=self.exact)

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
        sequence, hidden_SC = self._begin(tokens)
        return sequence, self._logits(hidden_SC[-1:])[0]

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
        rows = self.rows or 1
        skipped = first - first % rows
        hidden_SC = self._begin(tokens)[1][skipped:]
        parts = hidden_SC.split(self.rows or len(tokens))
        return torch.cat([self._logits(part) for part in parts])[first - skipped :]

    def _begin(self, tokens: Sequence[int]) -> tuple[CachedSequence, Tensor]:
        """Return a new sequence of the tokens, and their hidden states [S, C]."""
        length, size = len(tokens), self.model.attention.region_size
        if not 1 <= length <= self.model.sequence_length:
            raise ValueError(f"{length} tokens: a prompt has 1 ... {self.model.sequence_length}")
        caches = [LayerCache(core) for core in self.cores]
        padded = [*tokens, *[0] * (-length % size)]
        with self._attending(lambda layer: PromptAttention(caches[layer], length, self.exact)):
            hidden_SC = self._plain_layers.hidden_states(torch.tensor(padded, device=self.device))
        return CachedSequence(caches), hidden_SC[:length]

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
        rows = self.rows or len(pairs)
        parts = [self._step(pairs[first : first + rows]) for first in range(0, len(pairs), rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(self, pairs: Sequence[tuple[CachedSequence, int]]) -> Tensor:
        padding = (self.rows or len(pairs)) - len(pairs)
        tokens_B = torch.tensor([token for _, token in pairs] + [0] * padding, device=self.device)
        with self._attending(lambda layer: TokenAttention([one.layers[layer] for one, _ in pairs], self.exact)):
            hidden_BC = self._plain_layers.hidden_states(tokens_B)
        return self._logits(hidden_BC[: len(pairs)])

    def _logits(self, hidden_BC: Tensor) -> Tensor:
        """Hidden states [B, C] of up to `rows` tokens -> fp32 logits of as many, [B, V]."""
        padding = (self.rows or hidden_BC.shape[0]) - hidden_BC.shape[0]
        padded = torch.nn.functional.pad(hidden_BC, (0, 0, 0, padding)) if padding else hidden_BC
        return self._plain_layers.logits(padded)[: hidden_BC.shape[0]]

    @contextmanager
    def _attending(self, state_of: Callable[[int], HeadsState]) -> Iterator[None]:
        """Let each layer attend by the state that `state_of` makes for its number."""
        try:
            for layer, core in enumerate(self.cores):
                core.state = state_of(layer)
            yield
        finally:
            for core in self.cores:
                core.state = None
