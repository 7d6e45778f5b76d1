"""Stop consensus: all ranks decide together whether to stop now. Every call is collective."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from biroute.configs.errors import FencedError, StoppedError
from biroute.launcher.attempts.journal import FencingToken
from biroute.launcher.ranks.stop_signal import StopRequest

_FENCE_SECONDS = 1.0  # between two reads of the fencing token, a small file on a shared disk
_CONTINUE, _FENCED = 0, 1000  # values in between are signal numbers


class StopConsensus:
    """Stops all ranks at the same point if any was asked to stop or if another attempt owns the run folder."""

    def __init__(self, stop: StopRequest, fencing_token: FencingToken, device: torch.device) -> None:
        self.stop = stop
        self.fencing_token = fencing_token
        self.signal_name = ""  # of the signal that caused the stop, on whichever rank it arrived
        self._device = device
        self._looked_at_fence = -_FENCE_SECONDS

    def to_stop(self) -> bool:
        """Return True on all ranks as soon as any rank was asked to stop. Collective.

        Raises:
            FencedError: another attempt owns the run folder; raised on all ranks.
        """
        wish = int(self.stop.signal) if self.stop.signal else _CONTINUE
        if dist.get_rank() == 0 and time.monotonic() - self._looked_at_fence >= _FENCE_SECONDS:
            self._looked_at_fence = time.monotonic()
            wish = wish if self.fencing_token.holds() else _FENCED
        wishes = torch.tensor([wish], dtype=torch.int32, device=self._device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        agreed = int(wishes.item())
        if agreed == _FENCED:
            self.fencing_token.check()
            raise FencedError(f"attempt {self.fencing_token.attempt} no longer owns {self.fencing_token.run_dir}")
        if agreed != _CONTINUE:
            self.signal_name = signal.Signals(agreed).name
        return agreed != _CONTINUE

    def check_before_training(self) -> None:
        """Check for a stop before the first step, when there is nothing to save. Collective.

        Raises:
            StoppedError: a rank was asked to stop; raised on all ranks.
            FencedError: another attempt owns the run folder; raised on all ranks.
        """
        if self.to_stop():
            raise StoppedError(
                f"stopped by {self.signal_name} before the first step; nothing is lost: run the same command again"
            )
