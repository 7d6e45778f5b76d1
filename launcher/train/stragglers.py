"""Finds ranks that are slower than others with the same work, by what each spends on its own part. No torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median_low

from biroute.configs.layout import Layout
from biroute.parallel.mesh.rank_order import coordinates_of

# The phases of PhaseClock in which a rank works. The others wait: communication for other ranks, and `optimizer`
# holds the sum of the gradient norm and ZeRO's gathers.
OWN_WORK = ("data", "forward", "backward")
FACTOR = 1.3  # a rank that needs this many times the median of its peers ...
POINTS = 3  # ... at so many log points in a row is reported ...
PAUSE_SECONDS = 3600.0  # ... once in this time


class Stragglers:
    """Compares the ranks of a pipeline stage that hold the same regions: they compute the same for other data.

    A wait in a collective inside forward or backward counts as work, so tensor ranks, which wait for each other in
    every layer, look equally slow, and so do data ranks with ZeRO-3.
    """

    def __init__(
        self,
        layout: Layout,
        hosts: Sequence[str],
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hosts` are the host names of all ranks, by rank; `say` takes the message."""
        places = defaultdict[tuple[int, int], list[int]](list)
        for rank in range(layout.world_size):
            at = coordinates_of(layout, rank)
            places[at.pipe, at.region].append(rank)
        self._peers = [ranks for ranks in places.values() if len(ranks) > 1]
        self._hosts, self._say, self._now = hosts, say, now
        self._slow, self._points = -1, 0  # the rank that was too slow at the last point, and for how many
        self._silent_until = -float("inf")

    def judge(self, phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Judge the seconds that each rank spent in each phase of a step, in the mean since the last log point.

        Returns:
            `throughput/slowest_rank_ratio`, the largest time of a rank for its own work over the median of its peers
            (of an even number the lower one in the middle), and that rank's number; nothing where no rank has peers.
        """
        own = [sum(one[name] for name in OWN_WORK) for one in phases]
        found = []
        for ranks in self._peers:
            slowest, median = max(ranks, key=lambda rank: own[rank]), median_low([own[rank] for rank in ranks])
            if median > 0:
                found.append((own[slowest] / median, slowest, ranks))
        if not found:
            return {}
        ratio, rank, ranks = max(found)
        self._points = (self._points + 1 if rank == self._slow else 1) if ratio >= FACTOR else 0
        self._slow = rank
        if self._points >= POINTS and self._now() >= self._silent_until:
            self._silent_until = self._now() + PAUSE_SECONDS
            self._say(self._explain(rank, ratio, ranks, phases))
        return {"throughput/slowest_rank_ratio": ratio, "throughput/slowest_rank": float(rank)}

    def _explain(self, rank: int, ratio: float, ranks: list[int], phases: Sequence[Mapping[str, float]]) -> str:
        medians = {name: median_low([phases[peer][name] for peer in ranks]) for name in OWN_WORK}
        part = max(OWN_WORK, key=lambda name: phases[rank][name] - medians[name])
        return (
            f"warning: rank {rank} on {self._hosts[rank]} has been the slowest for {self._points} log points: its "
            f"own work takes {ratio:.2f} times as long as the median of its peers, above all {part}, "
            f"{phases[rank][part]:.3f} s a step instead of {medians[part]:.3f} s"
        )
