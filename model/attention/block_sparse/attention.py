"""Attention over a route with the Triton kernels: forward and backward, for whole layers and for parts of a route.

The functions take and give what `partial_attention` and `partial_attention_backward` of `partial.py` do, which are
their reference. Nothing here waits for the device, and nothing is added by atomic operations.

Shapes: B sequences, H query heads, G key/value heads, Z = B * G, r = H / G, S query tokens, Sk key tokens, D head
size, L region size, N query blocks, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from biroute.model.attention.block_sparse import backward, forward
from biroute.model.attention.block_sparse.plan import Blocking, TilePlan, Visits, cut_segments, invert, plan_tiles
from biroute.model.attention.grid import RegionGrid

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 256
# Partial results of one launch: large enough to hide the launches, small compared with a layer's activations. No more
# than three eighths of what the queries take, unless that is little.
SCRATCH_BYTES, LEAST_SCRATCH_BYTES = 384 << 20, 64 << 20
# Query rows of one product: 64 fill the tensor cores without spilling registers, 128 where a tile is one large block.
FORWARD_ROWS, BLOCK_ROWS, BACKWARD_ROWS = 64, 128, 64
# Query rows that one program streams past a region: fewer balance better, more add up fewer parts of a gradient.
FORWARD_UNIT_ROWS, BACKWARD_UNIT_ROWS = 1024, 4096


@torch.no_grad()
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the regions in k and v; see `partial_attention`.

    Args:
        q: [B, H, S, D].
        k: [B, G, Sk, D].
        v: [B, G, Sk, D].
        route: [B, G, S // Lq, K] regions of k, -1 = empty.
        grid: sizes, causality and scale.
        out_dtype: of the output; left out: q's.

    Returns:
        out [B, H, S, D] and its natural log-sum-exp, fp32 [B, H, S] (0 and -inf for a query without a visible key).
    """
    call = Call.of(q, k, v, route, grid)
    out = torch.empty_like(call.q, dtype=out_dtype)
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    for launch in call.forward_launches():
        if launch.visits is not None:
            _region_forward(call, launch)
        _query_forward(call, launch, out, lse)
    return out, lse


@torch.no_grad()
def sparse_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    grid: RegionGrid,
    *,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the regions in k and v in the gradients of attention over a whole route.

    Args:
        q, k, v, route, grid: as for `sparse_attention`.
        dout: [B, H, S, D] gradient of the output of the whole route.
        lse: fp32 [B, H, S] log-sum-exp over the whole route.
        delta: fp32 [B, H, S] sum over D of the whole route's output times dout.
        out_dtype: of the gradients; left out: those of q, k and v.

    Returns:
        dq, dk, dv, shaped like q, k and v.
    """
    call = Call.of(q, k, v, route, grid)
    upstream = dout.contiguous(), lse.contiguous(), delta.contiguous()
    dq = torch.empty_like(call.q, dtype=out_dtype)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (call.k, call.v))
    for launch in call.backward_launches():
        _region_backward(call, launch, upstream, dk, dv)
        _query_backward(call, launch, upstream, dq)
    del launch, call  # their scratch memory, before the gradients are rounded into new memory, one after the other
    dk = dk.to(out_dtype or k.dtype)
    return dq, dk, dv.to(out_dtype or v.dtype)


def output_delta(out: Tensor, dout: Tensor) -> Tensor:
    """Sum over D of out * dout: [B, H, S, D] twice -> fp32 [B, H, S]."""
    out, dout = out.contiguous(), dout.contiguous()
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    rows, head_size = delta.numel(), out.shape[3]
    backward.output_delta[(triton.cdiv(rows, 32),)](
        out, dout, delta, rows, D=head_size, DIM=triton.next_power_of_2(head_size), ROWS=32
    )
    return delta


@dataclass(frozen=True)
class Launch:
    """Some segments: which, their scattered (or all) pairs sorted by region, and memory for partial results."""

    first: int  # the first segment
    segments: int
    blocks: int  # query blocks of a segment
    chunks: int  # segments of a key/value head
    visits: Visits | None
    part: Tensor  # outputs or dq of scattered pairs
    part_lse: Tensor


@dataclass(frozen=True)
class Call:
    """One call: contiguous inputs, the plan, and the sizes that the kernels are compiled for."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor  # int32 [Z, N, K]
    plan: TilePlan
    sizes: Blocking
    grid: RegionGrid

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, route: Tensor, grid: RegionGrid) -> Call:
        check_sizes(q, k)
        sizes = Blocking.of(
            heads=q.shape[1] // k.shape[1],
            block=grid.query_block_size,
            region=grid.region_size,
            head_size=q.shape[3],
        )
        route = route.flatten(0, 1).int().contiguous()
        plan = plan_tiles(route, k.shape[2] // grid.region_size, sizes)
        return Call(q.contiguous(), k.contiguous(), v.contiguous(), route, plan, sizes, grid)

    @property
    def regions(self) -> int:
        return self.k.shape[2] // self.grid.region_size

    @property
    def tokens(self) -> tuple[int, int]:
        """Query and key tokens."""
        return self.q.shape[2], self.k.shape[2]

    @property
    def scale2(self) -> float:
        """The scale of scores to the base 2."""
        return self.grid.scale * LOG2_E

    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        head_size = self.q.shape[3]
        return {
            "REGION": self.sizes.region,
            "PARTS": self.sizes.parts,
            "PART": self.sizes.part,
            "KEYS": max(16, triton.next_power_of_2(self.sizes.part)),
            "D": head_size,
            "DIM": max(16, triton.next_power_of_2(head_size)),
        }

    def products(self) -> dict[str, Any]:
        """What the kernels with products are compiled for."""
        # fp32 inputs are for tests and small models: exact products rather than tf32.
        return {
            **self.constants(),
            "SLOTS": self.route.shape[2],
            "HEADS": self.sizes.heads,
            "BLOCK": self.sizes.block,
            "CAUSAL": self.grid.causal,
            "PRECISION": "ieee",
            "num_stages": 2,
        }

    def tiles(self, launch: Launch, most_rows: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Programs of a kernel that goes tile by tile, and what it is compiled for."""
        rows = self.sizes.tile * self.sizes.rows
        of_program = max(16, min(most_rows, triton.next_power_of_2(rows)))
        programs = triton.cdiv(launch.blocks, self.sizes.tile), triton.cdiv(rows, of_program), launch.segments
        return programs, {
            **self.products(),
            "LISTED": self.plan.listed.shape[2],
            "TILE": self.sizes.tile,
            "ROWS": of_program,
            "SCATTERED": not self.sizes.all_shared,
            "num_warps": 8 if of_program > 64 else 4,
        }

    def results(self) -> int:
        """Elements of the partial results of a query block's scattered pairs, for one element of a head."""
        return 0 if self.sizes.all_shared else self.route.shape[2] * self.sizes.parts * self.sizes.rows

    def forward_launches(self) -> Iterator[Launch]:
        """The launches of forward, with the visits of scattered pairs."""
        bytes_per_block = self.results() * (self.q.shape[3] * self.q.element_size() + 4)
        kept = None if self.sizes.all_shared else self.plan.scattered
        yield from self._launches(bytes_per_block, max(1, FORWARD_UNIT_ROWS // self.sizes.rows), kept)

    def backward_launches(self) -> Iterator[Launch]:
        """The launches of backward, with the visits of all pairs."""
        head_size, unit = self.q.shape[3], max(1, BACKWARD_UNIT_ROWS // self.sizes.rows)
        bytes_per_block = self.results() * head_size * self.q.element_size()
        bytes_of_unit = (
            2 * self.sizes.parts * self.sizes.part * head_size * 4
        )  # dk and dv of a unit that is not the first
        yield from self._launches(
            bytes_per_block + self.route.shape[2] * bytes_of_unit // unit, unit, self.route >= 0
        )

    def _launches(self, bytes_per_block: int, unit_size: int, kept: Tensor | None) -> Iterator[Launch]:
        heads, num_blocks, slots = self.route.shape
        scratch = min(SCRATCH_BYTES, max(LEAST_SCRATCH_BYTES, self.q.nbytes * 3 // 8))
        blocks, at_once = cut_segments(heads, num_blocks, bytes_per_block, self.sizes.tile, scratch)
        chunks = triton.cdiv(num_blocks, blocks)
        visits = None
        if kept is not None:
            region = torch.where(kept, self.route, self.regions)
            region = pad(region, (0, 0, 0, chunks * blocks - num_blocks), value=self.regions)
            visits = invert(region.view(heads * chunks, blocks * slots), self.regions, unit_size)
        results = at_once * blocks * self.results()
        part = self.q.new_empty(results * self.q.shape[3])
        part_lse = self.q.new_empty(results, dtype=torch.float32)
        for first in range(0, heads * chunks, at_once):
            yield Launch(first, min(at_once, heads * chunks - first), blocks, chunks, visits, part, part_lse)


def rows_of_product(sizes: Blocking) -> int:
    """Return the most query rows of a product of `query_forward`."""
    return BLOCK_ROWS if sizes.tile == 1 else FORWARD_ROWS


def check_sizes(q: Tensor, k: Tensor) -> None:
    """Raise a ValueError for sizes that the kernels do not take: offsets inside one head are 32 bits wide."""
    if k.shape[2] * k.shape[3] >= 2**31:
        raise ValueError(f"a head's keys have {k.shape[2] * k.shape[3]} elements; the kernels take less than 2^31")
    if q.shape[3] > LARGEST_HEAD:
        raise ValueError(f"head size {q.shape[3]}; the kernels take at most {LARGEST_HEAD}")


def _region_forward(call: Call, launch: Launch) -> None:
    visits = launch.visits
    assert visits is not None
    units = visits.unit_region.shape[1]
    forward.region_forward[(units, launch.segments, call.sizes.parts)](
        call.q, call.k, call.v, visits.order, visits.start, visits.unit_region, visits.unit_first, launch.part,
        launch.part_lse, launch.first, launch.chunks, launch.blocks, units, *call.tokens, call.regions, call.scale2,
        **call.products(), ROWS=FORWARD_ROWS, UNIT=visits.unit_size, num_warps=4,
    )  # fmt: skip


def _query_forward(call: Call, launch: Launch, out: Tensor, lse: Tensor) -> None:
    programs, constants = call.tiles(launch, rows_of_product(call.sizes))
    plan = call.plan
    forward.query_forward[programs](
        call.q, call.k, call.v, plan.listed, plan.members, plan.counts, plan.scattered, launch.part, launch.part_lse,
        out, lse, launch.first, launch.chunks, launch.blocks, call.route.shape[1], plan.counts.shape[1], *call.tokens,
        call.scale2, **constants,
    )  # fmt: skip


def _region_backward(
    call: Call, launch: Launch, upstream: tuple[Tensor, Tensor, Tensor], dk: Tensor, dv: Tensor
) -> None:
    visits, sizes = launch.visits, call.sizes
    assert visits is not None
    units, extras = visits.unit_region.shape[1], visits.num_extra
    elements = launch.segments * extras * sizes.parts * sizes.part * dk.shape[3]
    extra_dk, extra_dv = dk.new_empty(elements), dv.new_empty(elements)
    backward.region_backward[(units, launch.segments, sizes.parts)](
        call.q, call.k, call.v, *upstream, visits.order, visits.start, visits.unit_region, visits.unit_first,
        visits.extra_first, call.plan.scattered, launch.part, dk, dv, extra_dk, extra_dv, launch.first, launch.chunks,
        launch.blocks, call.route.shape[1], units, extras, *call.tokens, call.regions, call.grid.scale, call.scale2,
        **call.products(), ROWS=BACKWARD_ROWS, UNIT=visits.unit_size, SCATTERED=not sizes.all_shared, num_warps=8,
    )  # fmt: skip
    if extras:
        backward.add_extra_units[(call.regions, launch.segments, sizes.parts)](
            visits.extra_first, dk, dv, extra_dk, extra_dv, launch.first, launch.chunks, extras, call.k.shape[2],
            call.regions, **call.constants(), num_warps=4,
        )  # fmt: skip


def _query_backward(call: Call, launch: Launch, upstream: tuple[Tensor, Tensor, Tensor], dq: Tensor) -> None:
    programs, constants = call.tiles(launch, BACKWARD_ROWS)
    plan = call.plan
    backward.query_backward[programs](
        call.q, call.k, call.v, *upstream, plan.listed, plan.members, plan.counts, plan.scattered, launch.part, dq,
        launch.first, launch.chunks, launch.blocks, call.route.shape[1], plan.counts.shape[1], *call.tokens,
        call.grid.scale, call.scale2, **constants,
    )  # fmt: skip
