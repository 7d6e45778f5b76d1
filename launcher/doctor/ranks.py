"""Checks that several ranks do together: an all-reduce, their clocks, and whether they are alike."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

from biroute.launcher.doctor.check import Check
from biroute.launcher.ranks.rendezvous import Place
from biroute.parallel.messages import gather_messages

_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}  # of the tensor that is summed
_CLOCK_SECONDS = 5.0
# They differ between good machines.
_OWN = ("host", "memory", "run folder", "routed attention", "matrix product", "fabric")


def joint_checks(place: Place, own: Sequence[Check]) -> Iterator[Check]:
    """Sum a tensor over all ranks, and compare their clocks and what they found. Collective; complete on rank 0."""
    yield all_reduce_check(place)
    yield clock_check()
    found = [[Check(**one) for one in checks] for checks in gather_messages([asdict(check) for check in own])]
    if place.rank == 0:
        yield from differences(found)
        for rank, checks in enumerate(found[1:], start=1):
            host = next(check.value for check in checks if check.name == "host")
            yield from (
                Check(f"rank {rank} on {host}, {check.name}", check.value, check.problem)
                for check in checks
                if check.problem
            )


def leave_together() -> None:
    """Close the process group on all ranks. Collective.

    A rank that ends while others still use the group makes them abort.
    """
    dist.barrier()
    dist.destroy_process_group()


def all_reduce_check(place: Place) -> Check:
    """Sum a large tensor over all ranks. The rate is what a ring would move through each rank."""
    numbers = _BYTES[place.device.type] // 4
    x = torch.full((numbers,), float(place.rank), device=place.device)
    dist.all_reduce(x.clone())  # the first one makes the connections
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(x)
    total = float(x[-1])  # waits for the device
    seconds = time.perf_counter() - began
    ranks = place.world_size
    moved = 2 * (ranks - 1) / ranks * numbers * 4
    wrong = "" if total == ranks * (ranks - 1) / 2 else f"the sum is {total}; the network or its library is broken"
    return Check(f"all-reduce of {ranks} ranks", f"{seconds * 1e3:.1f} ms, {moved / seconds / 1e9:.3g} GB/s", wrong)


def clock_check() -> Check:
    """Compare every rank's clock with rank 0's."""
    dist.barrier()
    times: list[float] = gather_messages(time.time())
    ahead = max((clock - times[0] for clock in times), key=abs)
    wrong = "set up time synchronisation on the nodes" if abs(ahead) > _CLOCK_SECONDS else ""
    return Check("clocks", f"{abs(ahead):.2f} s apart at most", wrong)


def differences(found: Sequence[Sequence[Check]]) -> Iterator[Check]:
    """Name the ranks where a version or a number differs from most others."""
    for name in dict.fromkeys(check.name for checks in found for check in checks):
        if name.startswith(_OWN):
            continue
        values = [next((check.value for check in checks if check.name == name), "missing") for checks in found]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            other = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values) if value != usual)
            yield Check(f"{name} on all ranks", usual, f"{other}; make the nodes alike")
