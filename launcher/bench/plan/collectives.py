"""What goes through torch's process groups while a block of code runs, counted where all libraries must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Method of ProcessGroup -> which argument holds what each rank contributes or, for a gather, gets.
_COUNTED = {
    "allreduce": 0, "broadcast": 0, "reduce": 0, "send": 0, "allgather": 0,
    # Torch before 2.13 and since.
    "_allgather_base": 0, "all_gather_single": 0,
    "allgather_into_tensor_coalesced": 0, "all_gather_single_coalesced": 0,
    "_reduce_scatter_base": 1, "reduce_scatter_single": 1,
    "reduce_scatter_tensor_coalesced": 1, "reduce_scatter_single_coalesced": 1,
    "alltoall_base": 1, "all_to_all_single": 1,
}  # fmt: skip
# (ranks of the group or the name that was given for it, operation, bytes of the tensor) -> calls
Calls = Counter[tuple[tuple[int, ...] | str, str, int]]


def _size(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_size, argument))


@contextmanager
def counted_collectives(groups: dict[str, str] | None = None) -> Iterator[Calls]:
    """Count this rank's collectives and sends. A gather counts what it puts together, a scatter what it cuts.

    Args:
        groups: name of a process group -> a name to count it under; left out: groups count by their ranks, so that
            several groups of the same ranks are one.
    """
    calls: Calls = Counter()
    kind = torch.distributed.ProcessGroup
    kept = {name: getattr(kind, name) for name in _COUNTED if hasattr(kind, name)}

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            ranks = tuple(dist.get_process_group_ranks(group))
            known = None if groups is None else groups.get(group.group_name)
            calls[ranks if known is None else known, name, _size(arguments[_COUNTED[name]])] += len(ranks) > 1
            return method(group, *arguments, **options)

        return call

    for name, method in kept.items():
        setattr(kind, name, counting(name, method))
    try:
        yield calls
    finally:
        for name, method in kept.items():
            setattr(kind, name, method)
