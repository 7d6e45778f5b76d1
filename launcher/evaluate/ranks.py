"""Several ranks that evaluate together: each takes a share of the work, and all of them get all results.

What is computed at once, a batch of rows or one text, is the same whatever the number of ranks, and each of these is
computed by exactly one of them. So results do not depend on the number of ranks, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from biroute.configs.errors import UsageError
from biroute.launcher.generate.model_choice import ModelChoice

_T = TypeVar("_T")
_ITEMS_OF_A_MESSAGE = 10_000  # generated texts; a message of 64 MiB then has room for 6 KB each


class EvaluationRanks:
    """The ranks of an evaluation; without a process group, this process alone.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        """Describe this process; `device` is where collectives take their tensors from."""
        self.rank, self.size, self._device = rank, size, device

    def mine(self, number: int) -> bool:
        """Return whether this rank computes the part of this number."""
        return number % self.size == self.rank

    def join(self, values: np.ndarray) -> np.ndarray:
        """Return the values of all ranks, of which each has left at 0 what is not its own. Collective.

        Args:
            values: float64, of the same shape on every rank.
        """
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        joined = torch.from_numpy(np.array(values, dtype=np.float64)).to(self._device)
        dist.all_reduce(joined)  # x + 0 is x in every order
        return np.asarray(joined.cpu().numpy())

    def join_items(self, items: Sequence[_T | None]) -> list[_T]:
        """Return the items of all ranks, where others than this rank's are None: plain JSON values. Collective."""
        if self.size == 1:
            return list(items)  # type: ignore[arg-type]
        from biroute.parallel.messages import gather_messages

        joined: list[Any] = []
        for first in range(0, len(items), _ITEMS_OF_A_MESSAGE):
            found = gather_messages(list(items[first : first + _ITEMS_OF_A_MESSAGE]))
            joined += [found[(first + number) % self.size][number] for number in range(len(found[0]))]
        return joined

    def from_first(self, value: _T) -> _T:
        """Return rank 0's value, plain JSON, on every rank. Collective."""
        if self.size == 1:
            return value
        from biroute.parallel.messages import broadcast_message

        return broadcast_message(value)  # type: ignore[no-any-return]

    def all_or_none(self, work: Callable[[], _T]) -> _T:
        """Do something on every rank; where it fails on one of them, it fails on all. Collective.

        Raises:
            UsageError: that of the first rank that has one.
        """
        if self.size == 1:
            return work()
        from biroute.parallel.messages import gather_messages

        done: _T | None = None
        message = ""
        try:
            done = work()
        except UsageError as error:
            message = str(error)
        problems = [one for one in gather_messages(message) if one]
        if problems:
            raise UsageError(problems[0])
        return done  # type: ignore[return-value]


def join_ranks(choice: ModelChoice) -> EvaluationRanks:
    """Join the other ranks that the environment describes. Collective.

    Raises:
        UsageError: the environment is not that of a rank, there is no such run, or the ranks do not find each other.
    """
    from biroute.configs.load import load_config
    from biroute.launcher.attempts.run_files import CONFIG
    from biroute.launcher.generate.trained import choose_device, run_folder
    from biroute.launcher.ranks.environment import find_rank_environment
    from biroute.launcher.ranks.rendezvous import join_processes
    from biroute.launcher.ranks.secret import run_secret
    from biroute.parallel.mesh.megatron import groups_of_one

    run_dir, environment = run_folder(choice.run), find_rank_environment()
    train = load_config(run_dir / CONFIG).train.model_copy(update={"device": choice.device, "threads_per_rank": 0})
    # Local ranks meet in a folder that only this user can enter.
    place = join_processes(environment, train, run_secret(run_dir) if environment.address else None)
    # Made by all ranks together, so before one of them may fail.
    groups_of_one(choose_device(choice.device))
    return EvaluationRanks(place.rank, place.world_size, place.device.type)
