"""Level two over the own region and the one before it: the same for all tokens of a region, so without sorting.

The queries of a region times its band of keys are one dense block; the keys of neighbouring bands overlap in memory
and are never copied. Works on one key/value head of one sequence, on the `Inputs` of `tiles.py`.

Legend: as in `tiles.py`; n regions of a chunk, w regions of a band (1: own; 2: previous and own), u query blocks of a
region; L queries of a region and L keys of a region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from biroute.model.attention.tiles import LOG2_E, Gradients, Inputs, Upstream, Workspace, powers_


@dataclass(frozen=True)
class Band:
    """The dense part of a route.

    width: 1 or 2 regions. own_bias [L, L]: added to the exponents of a region's rows with its own keys (causal: -inf
    above the diagonal). previous_bias [X, u]: added to those of a block with the region before (-inf: not routed).
    """

    width: int
    own_bias: Tensor | None = None
    previous_bias: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """The queries of the regions start ... stop - 1 and their bands of `width` regions."""

    start: int
    stop: int
    width: int

    def rows(self, x_NM_: Tensor, region_size: int) -> Tensor:
        """The query rows of these regions: a view [n, L, ...] of a tensor [N, M, ...]."""
        rows = x_NM_.flatten(0, 1)[self.start * region_size : self.stop * region_size]
        return rows.unflatten(0, (self.stop - self.start, region_size))

    def keys(self, x_XLD: Tensor) -> Tensor:
        """The keys of these bands: an overlapping view [n, w * L, D]."""
        region_size = x_XLD.shape[1]
        tokens = x_XLD.flatten(0, 1)[(self.start - self.width + 1) * region_size : self.stop * region_size]
        return tokens.unfold(0, self.width * region_size, region_size).transpose(1, 2)

    def exponents(
        self, band: Band, q_n: Tensor, k_n: Tensor, scale: float, work: Workspace, summand: Tensor | None = None
    ) -> Tensor:
        """Masked exponents [n, L, w * L], plus `summand` (broadcast)."""
        exponent_n = work.product("weight", q_n, k_n.transpose(1, 2), scale * LOG2_E, summand)
        region_size = q_n.shape[1]
        if band.own_bias is not None:
            exponent_n[..., -region_size:] += band.own_bias
        if band.previous_bias is not None and self.width == 2:
            bias_nu = band.previous_bias[self.start : self.stop, :, None, None]
            exponent_n.unflatten(1, (bias_nu.shape[1], -1))[..., :region_size] += bias_nu
        return exponent_n


def band_blocks(band: Band, x: Inputs, work: Workspace) -> Iterator[Block]:
    """All regions, in chunks whose buffers hold about `work.elements` elements."""
    num_regions, region_size, head_size = x.k.shape
    yield Block(0, 1, 1)  # nothing comes before region 0
    per_region = region_size * band.width * (2 * region_size + 4 * head_size)
    step = max(1, work.elements // per_region)
    for start in range(1, num_regions, step):
        yield Block(start, min(start + step, num_regions), band.width)


def band_forward(band: Band, x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Write the unnormalised output, the sum of weights and x's level (largest exponent) of every query row."""
    region_size = x.k.shape[1]
    for block in band_blocks(band, x, work):
        k_n, v_n = work.cast("k", block.keys(x.k)), work.cast("v", block.keys(x.v))
        for h, q_NMD in enumerate(x.q):
            q_n = work.cast("q", block.rows(q_NMD, region_size))
            weight_n = block.exponents(band, q_n, k_n, x.scale, work)
            level_n = weight_n.amax(-1)
            powers_(weight_n.sub_(level_n[..., None]))
            block.rows(out_rNMD[h], region_size).copy_(work.product("out", weight_n, v_n))
            block.rows(sum_rNM[h], region_size).copy_(weight_n.sum(-1))
            block.rows(x.level[h], region_size).copy_(level_n)


def band_backward(band: Band, x: Inputs, up: Upstream, grads: Gradients, work: Workspace) -> None:
    """Write dq and add to dk and dv; the level is the log-sum-exp."""
    region_size = x.k.shape[1]
    for block in band_blocks(band, x, work):
        k_n, v_n = work.cast("k", block.keys(x.k)), work.cast("v", block.keys(x.v))
        dk_n, dv_n = work.take("dk", k_n.shape, k_n), work.take("dv", v_n.shape, v_n)
        for h, q_NMD in enumerate(x.q):
            q_n = work.cast("q", block.rows(q_NMD, region_size))
            do_n = work.cast("do", block.rows(up.dout[h], region_size))
            levels_n, deltas_n = (-block.rows(rows[h], region_size)[..., None] for rows in (x.level, up.delta))
            weight_n = powers_(block.exponents(band, q_n, k_n, x.scale, work, levels_n))
            dscore_n = work.product("dscore", do_n, v_n.transpose(1, 2), summand=deltas_n).mul_(weight_n)
            dv_n.baddbmm_(weight_n.transpose(1, 2), do_n, beta=min(h, 1))
            dk_n.baddbmm_(dscore_n.transpose(1, 2), q_n, beta=min(h, 1), alpha=x.scale)
            block.rows(grads.dq[h], region_size).copy_(work.product("dq", dscore_n, k_n, x.scale))
        for part in range(block.width):
            before = block.width - 1 - part
            regions = slice(block.start - before, block.stop - before)
            keys_of_part = slice(part * region_size, (part + 1) * region_size)
            grads.dk[regions] += dk_n[:, keys_of_part]
            grads.dv[regions] += dv_n[:, keys_of_part]
