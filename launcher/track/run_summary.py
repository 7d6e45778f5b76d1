"""What MLflow says of a run in words: its description, kept current from the run folder. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from biroute.launcher.attempts.journal import Attempt, read_attempts
from biroute.launcher.attempts.run_files import CHECKPOINTS, METRICS_LOG
from biroute.launcher.track.metrics_log import scan
from biroute.launcher.track.progress_line import duration, with_prefix
from biroute.parallel.checkpoint.files import list_checkpoints

PREDICTED = "plan."  # tags of a run that say what was predicted of it before it began
_STEP_SECONDS, _TOKENS, _PEAK = "time/step_seconds", "progress/tokens", "memory/peak_gib"
_HELDOUT = (("heldout/bits_per_byte", "bits per byte"), ("heldout/loss", "nats per token"))


class RunSummary:
    """Follows a run's metrics log and sums up what has become of the run."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._read_bytes = 0
        self._last_step = 0
        self.useful_seconds = 0.0  # of steps that are part of the run; a step that was repeated counts once
        self.peak_gib = 0.0  # the most that a rank held at any point
        self.latest: dict[str, tuple[int, float]] = {}  # metric -> step, value

    def follow(self) -> None:
        """Take in what the metrics log has got since the last call."""
        for point, end in scan(self._run_dir / METRICS_LOG, self._read_bytes):
            self._read_bytes = end
            if point is None:
                continue
            self.add(point.step, point.metrics)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a point that is about to be written to the metrics log; `follow` then counts it no second time."""
        self.peak_gib = max(self.peak_gib, metrics.get(_PEAK, 0.0))
        self.latest |= {name: (step, value) for name, value in metrics.items()}
        if _STEP_SECONDS in metrics and step > self._last_step:
            self.useful_seconds += metrics[_STEP_SECONDS] * (step - self._last_step)
            self._last_step = step

    def goodput(self, attempts: Sequence[Attempt]) -> float | None:
        """Return the share of the wall time of all attempts that was spent in useful steps; None before the first."""
        wall = sum((attempt.ended or time.time()) - attempt.began for attempt in attempts)
        return min(1.0, self.useful_seconds / wall) if wall > 0 and self.useful_seconds else None

    def note(self, headline: str, steps: int, cause: str = "", tags: Mapping[str, str] | None = None) -> str:
        """Return the description of the run in Markdown.

        Args:
            headline: what is trained.
            steps: until when.
            cause: why the last attempt ends, if the journal does not have it yet.
            tags: of the run; those that begin with `PREDICTED` are shown beside what was measured.
        """
        attempts = read_attempts(self._run_dir)
        rows = [("progress", self._progress(steps)), ("held-out", self.heldout())]
        rows += [("speed", self._speed(attempts)), *self._beside(tags or {})]
        rows.append(("newest checkpoint", self._checkpoint()))
        if attempts:
            last = attempts[-1]
            rows.append(("attempts", f"{len(attempts)}; the last one: {last.cause or cause or 'running'}"))
        rows.append(("run folder", f"`{self._run_dir.absolute()}`"))
        lines = [headline, "", "| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows if text)]
        return "\n".join(lines)

    def heldout(self) -> str:
        """Return the newest held-out value in words; "" before the first evaluation."""
        for name, unit in _HELDOUT:
            if name in self.latest:
                step, value = self.latest[name]
                return f"{value:.4f} {unit} at step {step:,}"
        return ""

    def _progress(self, steps: int) -> str:
        if _TOKENS not in self.latest:
            return ""
        step, tokens = self.latest[_TOKENS]
        return f"step {step:,} of {steps:,}, {with_prefix(tokens)} tokens"

    def _speed(self, attempts: Sequence[Attempt]) -> str:
        share = self.goodput(attempts)
        if share is None or _TOKENS not in self.latest:
            return ""
        _, tokens = self.latest[_TOKENS]
        return (
            f"{with_prefix(tokens / self.useful_seconds)} tokens/s in the mean of all steps; {share:.0%} of the time "
            f"of all attempts ({duration(self.useful_seconds)}) went into them"
        )

    def _beside(self, tags: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return what was predicted of a step, and the same of what was measured; nothing if nothing was."""
        try:
            step, rate, peak = (
                float(tags[PREDICTED + name]) for name in ("step_seconds", "tokens_per_second", "peak_gib")
            )
        except (KeyError, ValueError):
            return []
        device = tags.get(f"{PREDICTED}device", "")
        rows = [("predicted", _of_a_step(step, rate, peak) + (f", on {device}" if device else ""))]
        if self.useful_seconds and _TOKENS in self.latest:
            _, tokens = self.latest[_TOKENS]
            mean = self.useful_seconds / self._last_step
            rows.append(("measured", _of_a_step(mean, tokens / self.useful_seconds, self.peak_gib)))
        return rows

    def _checkpoint(self) -> str:
        found = list_checkpoints(self._run_dir / CHECKPOINTS)
        return f"`{found[0].absolute()}`" if found else ""


def _of_a_step(step_seconds: float, tokens_per_second: float, peak_gib: float) -> str:
    return f"{step_seconds:.3g} s a step, {with_prefix(tokens_per_second)} tokens/s, {peak_gib:.3g} GiB of a rank"
