"""Attention over a route with the Triton kernels: forward and backward, for whole layers and for parts of a route.

The functions take and give what `partial_attention` and `partial_attention_backward` of `partial.py` do, which are
their reference. Nothing here waits for the device, and no float is added by an atomic operation.

Shapes: B sequences, H query heads, G key/value heads, Z = B * G, r = H / G, S query tokens, Sk key tokens, D head
size, L region size, N query blocks, K slots of a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from biroute.model.attention.block_sparse import backward, forward
from biroute.model.attention.block_sparse.plan import (
    Blocking,
    Sorted,
    TilePlan,
    Visits,
    cut_segments,
    make_plan,
    pairs_of_unit,
)
from biroute.model.attention.grid import RegionGrid

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 256
# Partial results of one launch: large enough to hide the launches, small compared with a layer's activations. No more
# than three quarters of what the queries take, or than the keys, unless that is little; those of one head at once if
# they are few: 256 MiB of bf16 rows and their log-sum-exps, in heads of 64 (in heads of 128 these take 4 MiB).
SCRATCH_BYTES, LEAST_SCRATCH_BYTES, SCRATCH_OF_HEAD = 768 << 20, 192 << 20, 264 << 20
# Query rows of one product: of a tile, and of what is streamed past a region. Where rows are wide (fp32, heads of
# 256), a tile's are fewer, so that queries and upstream gradients fit on chip beside keys and values.
TILE_ROWS, LEAST_TILE_ROWS, STREAMED_ROWS = 128, 64, 64
BYTES_ON_CHIP = 32 << 10
# Where a sequence has at most so many times as many regions as a block chooses, tiles share everything in forward:
# most regions have many visitors then, and a layer is one launch without partial results.
SHORT = 4
# Query rows of scattered pairs that one program streams past a region: fewer balance better, more add up fewer parts
# of a gradient. Large blocks make few visits of many rows. Of tiles that share the region it streams as many as stand
# for so many pairs.
FORWARD_UNIT_ROWS, BACKWARD_UNIT_ROWS, BLOCK_UNIT_ROWS = 1024, 4096, 16384


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
    call = Call.of(q, k, v, route, grid).turned()
    upstream = dout.contiguous(), lse.contiguous(), delta.contiguous()
    dq = torch.empty_like(call.q, dtype=out_dtype)
    dk, dv = torch.empty_like(call.k, dtype=out_dtype), torch.empty_like(call.v, dtype=out_dtype)
    sums = None if call.whole else call.new_sums()
    for launch in call.backward_launches():
        _region_backward(call, launch, upstream, dk, dv, sums)
        _query_backward(call, launch, upstream, dq)
    return dq, dk, dv


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
    """Some segments: which, the plan of the pass, and memory for partial results."""

    plan: TilePlan
    first: int  # the first segment
    segments: int
    blocks: int  # query blocks of a segment
    chunks: int  # segments of a key/value head
    visits: Visits | None
    part: Tensor  # outputs or dq of scattered pairs
    part_lse: Tensor  # of outputs

    @property
    def last_of_head(self) -> bool:
        """Whether it ends with the last segment of a head."""
        return (self.first + self.segments) % self.chunks == 0


@dataclass
class Sums:
    """dk and dv in fp32 of one head where launches see parts of a sequence: all heads use the same memory."""

    first: tuple[Tensor, Tensor]  # [Sk, D]: sums over the segments of each region's first units
    further: tuple[Tensor, Tensor] | None = None  # of all units beyond those, made with the first launch


@dataclass(frozen=True)
class Call:
    """One call: contiguous inputs, and the sizes that the kernels are compiled for."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor  # int32 [Z, N, K]
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
        if k.shape[2] // grid.region_size <= SHORT * route.shape[3]:
            sizes = replace(sizes, shared_from=1)
        route = route.flatten(0, 1).int().contiguous()
        return Call(q.contiguous(), k.contiguous(), v.contiguous(), route, sizes, grid)

    def turned(self) -> Call:
        """The same for backward, where tiles share less."""
        return replace(self, sizes=self.sizes.turned())

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

    @property
    def rows_of_product(self) -> int:
        """Query rows of a product of a kernel that goes tile by tile."""
        width = max(16, triton.next_power_of_2(self.q.shape[3])) * self.q.element_size()
        most = min(TILE_ROWS, max(LEAST_TILE_ROWS, BYTES_ON_CHIP // width))
        return int(max(16, min(most, triton.next_power_of_2(self.sizes.tile * self.sizes.rows))))

    def tiles(self, launch: Launch) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Programs of a kernel that goes tile by tile, and what it is compiled for."""
        rows, of_program = self.sizes.tile * self.sizes.rows, self.rows_of_product
        programs = triton.cdiv(launch.blocks, self.sizes.tile), triton.cdiv(rows, of_program), launch.segments
        return programs, {
            **self.products(),
            **self.lists(launch),
            "ROWS": of_program,
            "SCATTERED": not self.sizes.all_shared,
            "num_warps": 8 if of_program > 64 else 4,
        }

    def lists(self, launch: Launch) -> dict[str, int]:
        """What a kernel that reads the lists of tiles is compiled for."""
        return {"LISTED": launch.plan.listed.shape[2], "TILE": self.sizes.tile}

    def results(self) -> int:
        """Elements of the partial results of a query block's scattered pairs, for one element of a head."""
        return 0 if self.sizes.all_shared else self.route.shape[2] * self.sizes.parts * self.sizes.rows

    @property
    def bytes_of_result(self) -> int:
        """Bytes of a row of forward's partial results: an output and its fp32 log-sum-exp."""
        return self.q.shape[3] * self.q.element_size() + 4

    @property
    def scratch(self) -> int:
        """Bytes for the partial results of a launch."""
        of_head = self.route.shape[1] * self.results() * self.bytes_of_result
        least = max(LEAST_SCRATCH_BYTES, of_head if of_head <= SCRATCH_OF_HEAD else 0)
        return min(SCRATCH_BYTES, max(least, self.q.nbytes * 3 // 4, self.k.nbytes))

    @property
    def bytes_of_unit(self) -> int:
        """Bytes of fp32 dk and dv of a region."""
        return 2 * self.sizes.parts * self.sizes.part * self.q.shape[3] * 4

    @property
    def backward_unit(self) -> int:
        """Most pairs of a unit of backward."""
        return max(1, (BLOCK_UNIT_ROWS if self.sizes.tile == 1 else BACKWARD_UNIT_ROWS) // self.sizes.rows)

    @property
    def backward_bytes(self) -> int:
        """Bytes of a query block's partial results in backward, with its part of the units beyond the first ones."""
        of_units = self.route.shape[2] * self.bytes_of_unit // pairs_of_unit(self.backward_unit, self.sizes)
        return self.results() * self.q.shape[3] * self.q.element_size() + of_units

    @property
    def _of_regions(self) -> int:
        """A query block's part of the first units of all regions of its head."""
        return triton.cdiv(self.regions * self.bytes_of_unit, self.route.shape[1])

    @property
    def whole(self) -> bool:
        """Whether all units of a key/value head fit into one launch's memory, so that dk and dv are written once."""
        return self.route.shape[1] * (self.backward_bytes + self._of_regions) <= self.scratch

    def new_sums(self) -> Sums:
        """Memory for dk and dv of one head, summed over its segments in fp32 [Sk, D]."""
        dk, dv = (torch.empty(self.k.shape[2:], dtype=torch.float32, device=self.k.device) for _ in range(2))
        return Sums((dk, dv))

    def new_units(self, number: int) -> tuple[Tensor, Tensor]:
        """Memory for dk and dv of units, fp32 [number, PARTS, PART, D]."""
        elements = number * self.sizes.parts * self.sizes.part * self.k.shape[3]
        dk, dv = (torch.empty(elements, dtype=torch.float32, device=self.k.device) for _ in range(2))
        return dk, dv

    def forward_launches(self) -> Iterator[Launch]:
        """The launches of forward, with the visits of scattered pairs."""
        bytes_per_block = self.results() * self.bytes_of_result
        which: Sorted = "none" if self.sizes.all_shared else "scattered"
        yield from self._launches(bytes_per_block, max(1, FORWARD_UNIT_ROWS // self.sizes.rows), which)

    def backward_launches(self) -> Iterator[Launch]:
        """The launches of backward, with the visits of tiles and of scattered pairs."""
        if self.whole:
            yield from self._launches(self.backward_bytes + self._of_regions, self.backward_unit, "all")
        else:  # one head after the other, since they use the same sums
            of_results = self.results() * self.q.shape[3] * self.q.element_size()
            yield from self._launches(of_results, self.backward_unit, "all", most_at_once=1)

    def _launches(
        self, bytes_per_block: int, unit_size: int, which: Sorted, most_at_once: int | None = None
    ) -> Iterator[Launch]:
        heads, num_blocks, _ = self.route.shape
        blocks, at_once = cut_segments(heads, num_blocks, bytes_per_block, self.sizes.tile, self.scratch)
        at_once = min(at_once, most_at_once or at_once)
        chunks = triton.cdiv(num_blocks, blocks)
        plan, visits = make_plan(
            self.route, self.regions, self.sizes, blocks=blocks, unit_size=unit_size, which=which
        )
        results = at_once * blocks * self.results()
        part = self.q.new_empty(results * self.q.shape[3])
        part_lse = self.q.new_empty(0 if which == "all" else results, dtype=torch.float32)
        for first in range(0, heads * chunks, at_once):
            yield Launch(plan, first, min(at_once, heads * chunks - first), blocks, chunks, visits, part, part_lse)


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
        **call.products(), ROWS=STREAMED_ROWS, UNIT=visits.unit_size, num_warps=4,
    )  # fmt: skip


def _query_forward(call: Call, launch: Launch, out: Tensor, lse: Tensor) -> None:
    programs, constants = call.tiles(launch)
    plan = launch.plan
    forward.query_forward[programs](
        call.q, call.k, call.v, plan.listed, plan.members, plan.counts, plan.flags, launch.part, launch.part_lse,
        out, lse, launch.first, launch.chunks, launch.blocks, call.route.shape[1], plan.counts.shape[1], *call.tokens,
        call.scale2, **constants,
    )  # fmt: skip


def _region_backward(
    call: Call, launch: Launch, upstream: tuple[Tensor, Tensor, Tensor], dk: Tensor, dv: Tensor, sums: Sums | None
) -> None:
    """Gradients of keys and values, in `sums` where a launch sees a part of a sequence; dq of scattered pairs."""
    visits, sizes = launch.visits, call.sizes
    assert visits is not None
    units = visits.unit_region.shape[1]
    extras = units if sums is None else visits.num_extra
    if sums is None:
        further = call.new_units(launch.segments * extras)
    else:
        further = sums.further = sums.further or call.new_units(launch.chunks * extras)
    backward.region_backward[(units, launch.segments, sizes.parts)](
        call.q, call.k, call.v, *upstream, visits.order, visits.start, visits.unit_region, visits.unit_first,
        visits.extra_first, launch.plan.members, launch.part, *((dk, dv) if sums is None else sums.first), *further,
        launch.first, launch.chunks, launch.blocks, call.route.shape[1], launch.plan.counts.shape[1], units, extras,
        *call.tokens, call.regions, call.grid.scale, call.scale2, **call.products(), **call.lists(launch),
        ROWS=STREAMED_ROWS, UNIT=visits.unit_size, TILE_UNIT=visits.tile_unit,
        SCATTERED=not sizes.all_shared, WHOLE=sums is None, num_warps=8,
    )  # fmt: skip
    if sums is None:
        backward.join_units[(call.regions, launch.segments, sizes.parts)](
            visits.unit_first, dk, dv, *further, launch.first, units, call.k.shape[2], call.regions,
            **call.constants(), num_warps=4,
        )  # fmt: skip
    elif launch.last_of_head:
        backward.finish_head[(call.regions, sizes.parts)](
            visits.start, visits.extra_first, *sums.first, *further, dk, dv, launch.first, launch.chunks, extras,
            call.k.shape[2], call.regions, **call.constants(), num_warps=4,
        )  # fmt: skip


def _query_backward(call: Call, launch: Launch, upstream: tuple[Tensor, Tensor, Tensor], dq: Tensor) -> None:
    programs, constants = call.tiles(launch)
    plan = launch.plan
    backward.query_backward[programs](
        call.q, call.k, call.v, *upstream, plan.listed, plan.members, plan.counts, plan.flags, launch.part, dq,
        launch.first, launch.chunks, launch.blocks, call.route.shape[1], plan.counts.shape[1], *call.tokens,
        call.grid.scale, call.scale2, **constants,
    )  # fmt: skip
