"""Bytes that the region ranks moved, by layer and kind, compared with what other means would have moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from biroute.parallel.region.costs import Baselines
from biroute.parallel.region.plan import ExchangePlan

# What travels. "keys", "queries" and "results" are the payload of forward that a plan counts.
KINDS = ("keys", "queries", "results", "gradients", "requests", "descriptors", "gathered", "neighbours")


@dataclass
class TrafficLog:
    """One rank's counts since the last `clear`, as measured at its collectives."""

    num_ranks: int
    sent: dict[tuple[int, str], Tensor] = field(
        default_factory=dict
    )  # (layer, kind) -> bytes to each rank, int64 [P]
    received: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    planned: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # layer -> forward payload of the plans
    baselines: dict[int, list[Baselines]] = field(default_factory=lambda: defaultdict(list))
    _counting: bool = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside, because evaluation is not part of a step."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def add(self, layer: int, kind: str, sent: Sequence[int], received: Sequence[int]) -> None:
        """Count one all-to-all: bytes to and from each rank."""
        if not self._counting:
            return
        for counts, numbers in ((self.sent, sent), (self.received, received)):
            counts.setdefault((layer, kind), torch.zeros(self.num_ranks, dtype=torch.int64)).add_(
                torch.tensor(numbers)
            )

    def add_even(self, layer: int, kind: str, rank: int, size: int) -> None:
        """Count a collective in which each rank sends `size` bytes to each other one."""
        numbers = [0 if peer == rank else size for peer in range(self.num_ranks)]
        self.add(layer, kind, numbers, numbers)

    def add_plan(self, layer: int, plan: ExchangePlan, baselines: Baselines) -> None:
        """Record the bytes of this rank's plan for one forward pass, and those of the baselines."""
        if not self._counting:
            return
        self.planned[layer] += int(plan.received_bytes().sum() + plan.sent_bytes().sum())
        self.baselines[layer].append(baselines)

    def clear(self) -> None:
        for counts in (self.sent, self.received, self.planned, self.baselines):
            counts.clear()  # type: ignore[attr-defined]

    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.sent})

    def total(self, counts: dict[tuple[int, str], Tensor], layer: int | None = None) -> int:
        """Sum the bytes of all kinds, of one layer or of all layers."""
        return sum(int(n.sum()) for (where, _), n in counts.items() if layer in (None, where))
