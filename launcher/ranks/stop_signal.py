"""Signals that ask training to stop: recorded on arrival, acted upon between steps. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from biroute.configs.errors import EXIT_STOPPED, StoppedError
from biroute.configs.process import signal_when_parent_dies

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """Return the stop signals that are not ignored, as `nohup` ignores SIGHUP."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class StopRequest:
    """Records the first stop signal. Created before the slow imports, so that no signal kills a starting rank.

    A launcher starts its ranks with these signals blocked. They are unblocked here, and pending ones are delivered.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in handled_signals():
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def ending_at_once(self, note: Callable[[str], None]) -> Iterator[None]:
        """During rendezvous, let a signal end this process immediately, with status 75 and after `note(signal name)`.

        There is nothing to save and no stop consensus yet, and the main thread waits in C++ code, where Python runs
        no handler; so a thread reads the signals.

        Raises:
            StoppedError: a signal has already arrived.
        """
        if self.signal:
            note(self.signal.name)
            raise StoppedError(_ended(self.signal.name))
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        watch = threading.Thread(target=_end_on_signal, args=(reader, note), name="stop-signals", daemon=True)
        watch.start()
        previous = signal.set_wakeup_fd(writer)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(writer)
            watch.join()
            os.close(reader)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)


def end_on_signals() -> None:
    """In a rank that saves nothing: let signals end it as they end any process, and let it end with its launcher.

    The launcher starts its ranks with them blocked. Ctrl-C comes to rank 0 from the terminal and from the launcher;
    the second one would cut off what the first one makes it say.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal_when_parent_dies(signal.SIGTERM)


def _end_on_signal(reader: int, note: Callable[[str], None]) -> None:
    while received := os.read(reader, 1):
        number = received[0]
        if number in STOP_SIGNALS:
            name = signal.Signals(number).name
            note(name)
            print(_ended(name), file=sys.stderr, flush=True)
            os._exit(EXIT_STOPPED)


def _ended(name: str) -> str:
    return f"stopped by {name} before training began; nothing is lost: run the same command again to resume"
