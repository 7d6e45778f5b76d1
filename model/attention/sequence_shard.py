"""What a layer asks of whoever shares its sequences out to ranks; `parallel/region/shard.py` answers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from biroute.model.attention.grid import RegionGrid


class SequenceShard(Protocol):
    """This rank's run of tokens of sequences that several ranks share. `layer` only labels what is counted."""

    first_token: int
    sequence_length: int

    def all_key_descriptors(self, own: Tensor, layer: int) -> Tensor:
        """[B, G, R * n / P, D] of this rank's regions -> [B, G, R * n, D] of the whole sequence."""

    def key_before(self, k: Tensor, layer: int) -> Tensor:
        """[B, G, S, D] -> [B, G, 1, D], the key before this rank's first token, 0 at the start; differentiable."""

    def routed_attention(
        self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, layer: int
    ) -> Tensor:
        """q [B, H, S, D], k, v [B, G, S, D], route [B, G, N, K] of the whole sequence -> [B, H, S, D]."""

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, layer: int) -> Tensor:
        """The same over the whole sequence."""
