"""What a layer needs where ranks share sequences. `parallel/region/shard.py` implements it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from biroute.model.attention.grid import RegionGrid


class SequenceShard(Protocol):
    """This rank's consecutive tokens of sequences that several ranks share. `layer` only labels what is counted."""

    first_token: int
    sequence_length: int

    def all_key_descriptors(self, own: Tensor, layer: int) -> Tensor:
        """Gather the descriptors of all ranks: [B, G, R * n / P, D] -> [B, G, R * n, D]."""

    def key_before(self, k: Tensor, layer: int) -> Tensor:
        """Return the key before this rank's first token, 0 at the start: [B, G, S, D] -> [B, G, 1, D]."""

    def routed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, layer: int
    ) -> Tensor:
        """Attend to routed regions, wherever they are.

        Args:
            q: [B, H, S, D], this rank's queries.
            k: [B, G, S, D], this rank's keys.
            v: [B, G, S, D].
            route: int64 [B, G, S // Lq, K] regions of the whole sequence.
            grid: sizes, causality and scale.
            layer: number of the layer.

        Returns:
            [B, H, S, D].
        """

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, layer: int) -> Tensor:
        """Attend to every token of the whole sequence: q [B, H, S, D], k and v [B, G, S, D] -> [B, H, S, D]."""
