"""What all ranks must decide alike: whether to stop now. Every call is collective."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from biroute.configs.errors import FencedError, StoppedError
from biroute.launcher.attempts.journal import FencingToken
from biroute.launcher.ranks.stop_signal import StopRequest

_FENCE_SECONDS = 1.0  # between two looks at the fencing token, a small file on a shared disk
_GO_ON, _FENCED = 0, 1000  # in between: the number of a signal


class StopConsensus:
    """Stops all ranks at the same point, if one was asked to or if the run folder has a new owner."""

    def __init__(self, stop: StopRequest, fencing_token: FencingToken, device: torch.device) -> None:
        self.stop = stop
        self.fencing_token = fencing_token
        self.signal_name = ""  # of the signal that they stop for, whichever rank got it
        self._device = device
        self._looked_at_fence = -_FENCE_SECONDS

    def to_stop(self) -> bool:
        """True on all ranks as soon as one was asked to stop. Collective.

        Raises:
            FencedError: another attempt owns the run folder; on all ranks.
        """
        wish = int(self.stop.signal) if self.stop.signal else _GO_ON
        if dist.get_rank() == 0 and time.monotonic() - self._looked_at_fence >= _FENCE_SECONDS:
            self._looked_at_fence = time.monotonic()
            wish = wish if self.fencing_token.holds() else _FENCED
        wishes = torch.tensor([wish], dtype=torch.int32, device=self._device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        agreed = int(wishes.item())
        if agreed == _FENCED:
            self.fencing_token.check()
            raise FencedError(f"attempt {self.fencing_token.attempt} no longer owns {self.fencing_token.run_dir}")
        if agreed != _GO_ON:
            self.signal_name = signal.Signals(agreed).name
        return agreed != _GO_ON

    def check_before_training(self) -> None:
        """Raises StoppedError on all ranks if one was asked to stop: nothing is trained yet, nothing is saved."""
        if self.to_stop():
            raise StoppedError(
                f"stopped by {self.signal_name} before the first step; nothing is lost: run the same command again"
            )
