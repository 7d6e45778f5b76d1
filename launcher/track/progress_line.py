"""Shows the progress of a run: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_REDRAWS_PER_SECOND = 8.0
_RATE_WINDOW = 30  # number of updates from which the remaining time is estimated
_BAR_WIDTHS = range(8, 31)
_LEAST_WANTED = ("throughput/tflops_per_rank", "optim/learning_rate", "throughput/tokens_per_second", "train/loss")
_NO_READER = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


class ProgressLine:
    """Shows the progress of a run, on rank 0. No method raises, whatever fails.

    `update` and `close` are called from the training thread, `message` from any thread.
    """

    def __init__(self, total_steps: int, *, log_every: int = 1, stream: TextIO | None = None) -> None:
        """Create the line; nothing is shown before the first update.

        Args:
            total_steps: optimizer steps of the whole run.
            log_every: steps between plain lines, if `stream` is not a terminal.
            stream: standard output by default; a terminal shows a live line.
        """
        self._total_steps = total_steps
        self._log_every = log_every
        self._stream = stream if stream is not None else sys.stdout
        self._lock = threading.RLock()
        self._history: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._drawn_at = -math.inf
        self._closed = False
        self._gone = False  # whether the terminal or pipe is gone
        self._console: Console | None = None
        self._live: Live | None = None
        self._safely(self._find_terminal)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show `step` with `train/loss`, `optim/learning_rate` and `throughput/...`; omitted ones keep their value.

        On a terminal the line is redrawn a few times per second at most; elsewhere a line is printed every
        `log_every` steps and for the last step.
        """
        if not self._closed:
            self._safely(lambda: self._update(step, metrics))

    def message(self, text: str) -> None:
        """Print a separate line, above the live one."""
        self._safely(lambda: self._write(text))

    def close(self) -> None:
        """Finish the line in its last state; only messages are printed afterwards."""
        self._safely(self._stop)
        self._closed = True

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the last updates, including evaluations; None before the second update."""
        if len(self._history) < 2:
            return None
        (start, first), (end, last) = self._history[0], self._history[-1]
        if last <= first:
            return None
        return max(0.0, (self._total_steps - last) * (end - start) / (last - first))

    def _safely(self, action: Callable[[], None]) -> None:
        if self._gone:
            return
        with self._lock:
            try:
                action()
            except Exception as error:  # an error of the display must never end training
                if isinstance(error, OSError) and error.errno in _NO_READER:
                    self._give_up()

    def _find_terminal(self) -> None:
        if self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False, emoji=False, markup=False)

    def _update(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._history.append((now, step))
        self._step = step
        self._metrics |= metrics
        last = step >= self._total_steps
        if self._console is None:
            if last or step % self._log_every == 0:
                self._write(self._text())
        elif last or now - self._drawn_at >= 1.0 / _REDRAWS_PER_SECOND:
            self._drawn_at = now
            self._draw(self._console)

    def _write(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, soft_wrap=True)
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def _stop(self) -> None:
        if self._live is not None and self._console is not None:
            self._draw(self._console)
            self._live.stop()
            self._live = None

    def _text(self, width: int | None = None) -> str:
        """Return the line; the least wanted fields are left out if it would be wider than `width`."""
        left = self.seconds_left()
        shown: dict[str, Callable[[float], str]] = {
            "train/loss": lambda value: f"loss {value:.4f}",
            "optim/learning_rate": lambda value: f"lr {value:.2e}",
            "throughput/tokens_per_second": lambda value: f"{with_prefix(value)} tokens/s",
            "throughput/tflops_per_rank": lambda value: f"{value:.3g} TFLOP/s per rank",
        }
        fields = {name: text(float(self._metrics[name])) for name, text in shown.items() if name in self._metrics}
        for unwanted in ("", *_LEAST_WANTED):
            fields.pop(unwanted, None)
            line = "  ".join(
                [
                    f"step {self._step:>{len(str(self._total_steps))}}/{self._total_steps}",
                    *fields.values(),
                    f"{duration(left)} left" if left is not None else "-:-- left",
                ]
            )
            if width is None or len(line) <= width:
                break
        return line

    def _draw(self, console: Console) -> None:
        from rich.live import Live

        if self._live is None:
            # Without rich's refresh thread: an exception in it could not be caught here.
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._live.update(self._picture(console.width), refresh=True)

    def _picture(self, width: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = self._text(width)
        # Always a single row: a wrapped live line would leave its upper half behind at every redraw.
        cells: list[RenderableType] = [Text(text, no_wrap=True, overflow="ellipsis")]
        room = min(width - len(text) - 3, _BAR_WIDTHS.stop - 1)
        if room in _BAR_WIDTHS:
            cells.insert(0, ProgressBar(total=self._total_steps, completed=self._step, width=room))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*cells)
        return grid

    def _give_up(self) -> None:
        """Print nothing from now on, as the terminal or pipe is gone."""
        self._gone = True
        live, self._live = self._live, None
        with contextlib.suppress(Exception):
            # Buffered output, and what other code prints, must not fail at exit (status 120) either.
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, self._stream.fileno())
            os.close(quiet)
        if live is not None:
            with contextlib.suppress(Exception):
                live.stop()  # restores standard output and error, which rich had redirected


def duration(seconds: float) -> str:
    """Format a duration, such as `4:05`, `2:04:05` or `3d 02:04`."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def with_prefix(value: float) -> str:
    """Format a number with three digits and an SI prefix, such as `950`, `12.3k` or `4.56M`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return f"{value:.0f}"
