"""Attention over the own region and the one before it: the same for all tokens of a region, so nothing is sorted.

The queries of a region times its band of keys are one dense product. The keys of neighbouring bands overlap in memory
and are never copied. Everything here works on one key/value head of one sequence, on the `Inputs` of `tiles.py`.

Shapes: as in `tiles.py`, but W is the number of regions of a band (1: the own one; 2: the previous and the own one),
and the L tokens of a region are queries as well as keys. In loops over runs of regions, tensors without a suffix
begin with the regions of the run, and their second dimension holds the queries or keys of a region's band.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from biroute.model.attention.tiles import LOG2_E, Gradients, Inputs, Upstream, Workspace, powers_


@dataclass(frozen=True)
class Band:
    """The dense part of a route."""

    width: int  # W, 1 or 2
    # [L, L]: added to the exponents of a region's queries with its own keys (causal: -inf above the diagonal).
    own_bias: Tensor | None = None
    # [R, query blocks of a region]: added to the exponents of a block with the previous region (-inf: not routed).
    previous_bias: Tensor | None = None


@dataclass(frozen=True)
class RegionRun:
    """The queries of the regions start ... stop - 1 and their bands of `width` regions."""

    start: int
    stop: int
    width: int

    def rows(self, x: Tensor, region_size: int) -> Tensor:
        """View the query rows of these regions: [N, M, ...] -> [regions, L, ...]."""
        rows = x.flatten(0, 1)[self.start * region_size : self.stop * region_size]
        return rows.unflatten(0, (self.stop - self.start, region_size))

    def keys(self, x_RLD: Tensor) -> Tensor:
        """View the keys or values of these bands, which overlap: [R, L, D] -> [regions, W * L, D]."""
        region_size = x_RLD.shape[1]
        tokens = x_RLD.flatten(0, 1)[(self.start - self.width + 1) * region_size : self.stop * region_size]
        return tokens.unfold(0, self.width * region_size, region_size).transpose(1, 2)

    def exponents(
        self, band: Band, q: Tensor, k: Tensor, scale: float, work: Workspace, summand: Tensor | None = None
    ) -> Tensor:
        """Compute the masked exponents of this run.

        Args:
            band: the biases.
            q: [regions, L, D].
            k: [regions, W * L, D].
            scale: of the scores.
            work: buffers.
            summand: added to the exponents, broadcast.

        Returns:
            [regions, L, W * L], in the buffer "weight".
        """
        exponent = work.product("weight", q, k.transpose(1, 2), scale * LOG2_E, summand)
        region_size = q.shape[1]
        if band.own_bias is not None:
            exponent[..., -region_size:] += band.own_bias
        if band.previous_bias is not None and self.width == 2:
            bias = band.previous_bias[self.start : self.stop, :, None, None]
            exponent.unflatten(1, (bias.shape[1], -1))[..., :region_size] += bias
        return exponent


def region_runs(band: Band, x: Inputs, work: Workspace) -> Iterator[RegionRun]:
    """Yield all regions, in runs whose buffers hold about `work.ordered_elements` elements."""
    num_regions, region_size, head_size = x.k.shape
    yield RegionRun(0, 1, 1)  # no region comes before region 0
    per_region = region_size * band.width * (2 * region_size + 4 * head_size)
    # The gradient of a region at the border of two runs is summed in another order than within a run.
    step = max(1, work.ordered_elements // per_region)
    for start in range(1, num_regions, step):
        yield RegionRun(start, min(start + step, num_regions), band.width)


def band_forward(band: Band, x: Inputs, out_rNMD: Tensor, sum_rNM: Tensor, work: Workspace) -> None:
    """Write the unnormalised output, the sum of weights and the softmax offset of every query row.

    Args:
        band: the width and the biases.
        x: queries, keys and values; its softmax offset is overwritten by the largest exponent in the band.
        out_rNMD: [r, N, M, D] sum of weighted values, overwritten.
        sum_rNM: [r, N, M] sum of weights, overwritten.
        work: buffers.
    """
    region_size = x.k.shape[1]
    for run in region_runs(band, x, work):
        k, v = work.cast("k", run.keys(x.k)), work.cast("v", run.keys(x.v))
        for h, q_NMD in enumerate(x.q):
            q = work.cast("q", run.rows(q_NMD, region_size))
            weight = run.exponents(band, q, k, x.scale, work)
            offset = weight.amax(-1)
            powers_(weight.sub_(offset[..., None]))
            run.rows(out_rNMD[h], region_size).baddbmm_(weight, v, beta=0)
            run.rows(sum_rNM[h], region_size).copy_(weight.sum(-1))
            run.rows(x.softmax_offset[h], region_size).copy_(offset)


def band_backward(band: Band, x: Inputs, up: Upstream, grads: Gradients, work: Workspace) -> None:
    """Compute the weights of the band again, write dq, and add to dk and dv.

    Args:
        band: the width and the biases.
        x: queries, keys and values; the softmax offset is the log-sum-exp over the whole route, to the base 2.
        up: the gradient of the output.
        grads: dq is overwritten, dk and dv are added to.
        work: buffers.
    """
    region_size = x.k.shape[1]
    for run in region_runs(band, x, work):
        k, v = work.cast("k", run.keys(x.k)), work.cast("v", run.keys(x.v))
        dk, dv = work.take("dk", k.shape, k), work.take("dv", v.shape, v)
        for h, q_NMD in enumerate(x.q):
            q = work.cast("q", run.rows(q_NMD, region_size))
            dout = work.cast("do", run.rows(up.dout[h], region_size))
            negated_offset, negated_delta = (
                -run.rows(rows[h], region_size)[..., None] for rows in (x.softmax_offset, up.delta)
            )
            weight = powers_(run.exponents(band, q, k, x.scale, work, negated_offset))
            dscore = work.product("dscore", dout, v.transpose(1, 2), summand=negated_delta).mul_(weight)
            dv.baddbmm_(weight.transpose(1, 2), dout, beta=min(h, 1))
            dk.baddbmm_(dscore.transpose(1, 2), q, beta=min(h, 1), alpha=x.scale)
            run.rows(grads.dq[h], region_size).baddbmm_(dscore, k, beta=0, alpha=x.scale)
        for part in range(run.width):
            before = run.width - 1 - part
            regions = slice(run.start - before, run.stop - before)
            keys_of_part = slice(part * region_size, (part + 1) * region_size)
            grads.dk[regions] += dk[:, keys_of_part]
            grads.dv[regions] += dv[:, keys_of_part]
