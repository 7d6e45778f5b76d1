"""The numbers by which runs are compared, from what MLflow has of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from biroute.launcher.track.mlflow_history import RunHistory
from biroute.launcher.track.run_summary import PREDICTED

LOSS, HELDOUT, BITS = "train/loss", "heldout/loss", "heldout/bits_per_byte"
TOKENS, STEP_SECONDS, PEAK = "progress/tokens", "time/step_seconds", "memory/peak_gib"
RATE, RANK_RATE, RANK_TFLOPS = (
    "throughput/tokens_per_second",
    "throughput/tokens_per_second_per_rank",
    "throughput/tflops_per_rank",
)
EXCHANGE = ("region_bytes", "region_bytes_worst", "forward_bytes", "bound_bytes", "causal_fetch_bytes", "ring_bytes")
METRICS = (
    LOSS, HELDOUT, BITS, TOKENS, STEP_SECONDS, PEAK, RATE, RANK_RATE, RANK_TFLOPS,
    *(f"exchange/{name}" for name in EXCHANGE),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Values of a metric, each with the tokens, seconds and model operations that training had taken by then."""

    tokens: list[float]
    seconds: list[float]
    flops: list[float]
    values: list[float]


@dataclass(frozen=True)
class ComparedRun:
    """A run and what is computed from its history."""

    history: RunHistory

    @property
    def name(self) -> str:
        return self.history.name

    @cached_property
    def flops_per_token(self) -> float:
        """Model operations of a token; 0 if no point tells."""
        for values in self.history.steps.values():
            if values.get(RANK_RATE) and RANK_TFLOPS in values:
                return 1e12 * values[RANK_TFLOPS] / values[RANK_RATE]
        return 0.0

    @cached_property
    def progress(self) -> dict[int, tuple[float, float]]:
        """Step -> tokens and seconds of training by then. A point's step time is the mean since the point before."""
        found, last, seconds = dict[int, tuple[float, float]](), 0, 0.0
        for step, values in self.history.steps.items():
            if TOKENS in values and STEP_SECONDS in values:
                seconds += values[STEP_SECONDS] * (step - last)
                last = step
                found[step] = (values[TOKENS], seconds)
        return found

    def curve(self, metric: str) -> Curve:
        """Return a metric at the steps whose tokens are known."""
        steps = [step for step, values in self.history.steps.items() if metric in values and step in self.progress]
        tokens = [self.progress[step][0] for step in steps]
        return Curve(
            tokens=tokens,
            seconds=[self.progress[step][1] for step in steps],
            flops=[self.flops_per_token * count for count in tokens],
            values=[self.history.steps[step][metric] for step in steps],
        )

    def last(self, metric: str) -> float | None:
        """Return the newest value of a metric; None if it has none."""
        values = [one[metric] for one in self.history.steps.values() if metric in one]
        return values[-1] if values else None

    def middle(self, metric: str) -> float | None:
        """Return the median of a metric after its first point, which has the warm-up of everything."""
        values = [one[metric] for one in self.history.steps.values() if metric in one]
        return median(values[1:] or values) if values else None

    def most(self, metric: str) -> float | None:
        """Return the largest value of a metric."""
        return max((one[metric] for one in self.history.steps.values() if metric in one), default=None)

    def predicted(self, name: str) -> float | None:
        """Return what was predicted before the run began, such as `step_seconds`; None if nothing was."""
        try:
            return float(self.history.tags[PREDICTED + name])
        except (KeyError, ValueError):
            return None


def differing(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ: name, and the value of each run ("" where it has none)."""
    settings = [{**run.history.params, "layout": run.history.tags.get("layout", "")} for run in runs]
    names = sorted({name for one in settings for name in one})
    rows = [(name, [one.get(name, "") for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
