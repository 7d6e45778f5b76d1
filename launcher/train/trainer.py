"""The training loop: steps, log lines, held-out evaluation, checkpoints, and stopping on request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from biroute.configs.errors import DivergedError, FencedError, StoppedError
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.read.loader import Batch, MicrobatchLoader
from biroute.launcher.attempts.watchdog import Watchdog
from biroute.launcher.ranks.stop_consensus import StopConsensus
from biroute.launcher.train.heldout import heldout_metrics
from biroute.launcher.train.hooks import TrainerHook
from biroute.launcher.train.measurements import Measurements, is_log_point
from biroute.launcher.train.schedule import learning_rate
from biroute.launcher.train.spikes import SpikeWatch
from biroute.model.flops import train_flops_per_step
from biroute.parallel.checkpoint.files import folder_of_step
from biroute.parallel.checkpoint.meta import TrainingProgress
from biroute.parallel.checkpoint.save import SaveError, note_evaluation, save_checkpoint
from biroute.parallel.engine.engine import Engine, Microbatch, StepReport

SAVE_PAUSES = (5.0, 15.0, 45.0)  # seconds between the tries of a save: what a file server needs to come back


@dataclass
class Trainer:
    """Trains one attempt of a run. `about` describes the model in checkpoints; `hooks` are called on this rank."""

    config: RunConfig
    engine: Engine
    loader: MicrobatchLoader
    heldout: Iterable[Batch]
    checkpoints: Path
    about: dict[str, Any]
    stop_consensus: StopConsensus
    watchdog: Watchdog
    measurements: Measurements
    hooks: Sequence[TrainerHook] = ()
    step: int = 0
    _evaluation_pending: bool = False
    _spikes: SpikeWatch = field(init=False)
    _since_log: list[float] = field(default_factory=list)  # seconds of each step since the last log point
    _saved_step: int = -1
    _failed_saves: bool = False  # whether the last checkpoint that was due could not be saved
    _tokens: int = 0  # trained on since the run began
    _skipped: int = 0  # steps whose gradient was not finite or a spike, since the run began
    _skipped_in_a_row: int = 0
    _unsound: bool = False  # the gradient of this step was not finite, so its weights may not be good ones

    def __post_init__(self) -> None:
        self._spikes = SpikeWatch(self.config.optim.spike_window, self._say)

    def resume(self, progress: TrainingProgress) -> None:
        """Continue from the progress of a loaded checkpoint."""
        self.step = self._saved_step = progress.step
        self._tokens = progress.tokens
        self._evaluation_pending, self._skipped = progress.evaluation_pending, progress.skipped_steps
        self.engine.spike_guard.resume(progress.gradient_norms)
        self.watchdog.resumed(progress.step)
        self._say(f"resumed after step {progress.step}")

    def fit(self) -> None:
        """Train to the last step. Collective.

        Raises:
            StoppedError: a signal asked to stop; the state is saved.
            FencedError: another attempt owns the run folder; nothing is written.
            UsageError: a checkpoint could not be written.
            DivergedError: too many steps in a row had no sound gradient, or a weight is not finite.
        """
        train, checkpoint = self.config.train, self.config.checkpoint
        if self._evaluation_pending:
            self._evaluate()
        elif self.step >= train.steps:
            self._say(f"the run is at its last step, {self.step}: nothing to do; raise train.steps to continue")
        while self.step < train.steps:
            self.engine.clock.begin_step(logged=is_log_point(train, self.step + 1))
            # Before the step, so that a rank that waits for data still takes part in the stop consensus.
            with self.engine.clock.phase("data"):
                self.loader.wait(give_up=lambda: bool(self.stop_consensus.stop))
            self._stop_if_agreed()
            self._train_one_step()
            last = self.step == train.steps
            if last and self._unsound:
                raise DivergedError(self._explain_skipped("it is the last one"))
            # First the checkpoint, so that nothing in an evaluation can cost the steps before it. While gradients are
            # not finite, the state may be a bad one, which must not take the place of a good one.
            self._evaluation_pending = last or _due(self.step, train.evaluate_every)
            if (last or _due(self.step, checkpoint.every_steps)) and not self._unsound:
                self._save(SAVE_PAUSES, required=last or self._failed_saves)
            if self._evaluation_pending:
                self._evaluate()

    def _stop_if_agreed(self) -> None:
        """Save and raise StoppedError, on all ranks, if any rank was asked to stop. Collective."""
        if not self.stop_consensus.to_stop():
            return
        self._save(SAVE_PAUSES[:1], required=True)  # the scheduler does not wait for long
        raise StoppedError(
            f"stopped by {self.stop_consensus.signal_name} after step {self.step}; the state is saved: "
            "run the same command again to resume"
        )

    def _train_one_step(self) -> None:
        started = time.perf_counter()
        self.step += 1
        self._tokens += self.config.tokens_per_step
        rate = learning_rate(self.config.optim, self.step, self.config.train.steps)
        with self.engine.clock.phase("data"):
            microbatches = [
                Microbatch.of(*batch.arrays, mesh=self.engine.mesh, device=self.engine.device)
                for batch in self.loader.step()
            ]
        first = self.loader.position - self.config.train.global_batch_size
        with self.measurements.during(self.step):
            report = self.engine.train_step(microbatches, rate)
        self.engine.clock.end_step()
        self._spikes.look(self.step, report, first, self.loader.position - 1)
        self._count_skipped(report, first)
        seconds = time.perf_counter() - started
        self._since_log.append(seconds)
        self.watchdog.reached("training", self.step)
        if self.hooks:
            values = self._values(report, rate, seconds)
            for hook in self.hooks:
                hook.on_step(self.step, values)
        limit = self.config.optim.max_skipped_steps
        diverged = self._skipped_in_a_row >= limit
        if is_log_point(self.config.train, self.step):
            self._log(report, rate)
        elif diverged:  # the point at which the run ends
            for hook in self.hooks:
                hook.on_point(self.step, self._values(report, rate, seconds))
        if diverged:
            raise DivergedError(self._explain_skipped(f"optim.max_skipped_steps={limit}"))

    def _count_skipped(self, report: StepReport, first: int) -> None:
        """Count a step that changed nothing, and say which sequences it had: `first` and those after it."""
        self._skipped += report.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped else 0
        self._unsound = report.skipped and not report.spike
        if not report.skipped:
            return
        last = first + self.config.train.global_batch_size - 1
        self._say(
            f"warning: step {self.step} is skipped, its gradient {_fault(report)} (loss {report.loss:g}, sequences "
            f"{first} to {last} of the training order)"
        )

    def _explain_skipped(self, why: str) -> str:
        return (
            f"no sound gradient in {self._skipped_in_a_row} steps in a row, up to step {self.step} ({why}); the "
            "checkpoints before them are kept: resume with a lower optim.learning_rate, or look at the data"
        )

    def _values(self, report: StepReport, rate: float, step_seconds: float) -> dict[str, float]:
        """Return the metrics of this step under the names that MLflow shows."""
        ranks = dist.get_world_size()
        tokens_per_second = self.config.tokens_per_step / step_seconds
        return {
            "train/loss": report.loss,
            "optim/learning_rate": rate,
            "optim/grad_norm": report.gradient_norm,
            "optim/skipped_steps": float(self._skipped),
            "progress/tokens": float(self._tokens),
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_rank": tokens_per_second / ranks,
            "throughput/tflops_per_rank": train_flops_per_step(self.config) / step_seconds / ranks / 1e12,
            "time/step_seconds": step_seconds,
        }

    def _log(self, report: StepReport, rate: float) -> None:
        """Log one point: the values of this step, with times averaged since the last point. Collective."""
        measured = self.measurements.gather(self.step, self._since_log)
        self._since_log.clear()
        values = self._values(report, rate, measured["time/step_seconds"]) | measured | self._spikes.take()
        for hook in self.hooks:
            hook.on_point(self.step, values)

    def _evaluate(self) -> None:
        """Measure the loss, on the same held-out sequences each time. Collective.

        A stop interrupts the evaluation between two batches; the next attempt then begins with it.
        """
        values = heldout_metrics(self.engine, self.heldout, self._between_batches)
        self._evaluation_pending = False
        self._say(
            f"step {self.step}: held-out loss {values['heldout/loss']:.4f}, "
            f"perplexity {values['heldout/perplexity']:.1f}, {values['heldout/bits_per_byte']:.4f} bits per byte"
        )
        for hook in self.hooks:
            hook.on_point(self.step, values)
            hook.on_evaluate(self.step, values)
        if self._saved_step == self.step and dist.get_rank() == 0:
            self._note_evaluation()

    def _note_evaluation(self) -> None:
        """Write into the checkpoint of this step that it is evaluated. If that fails, a resume evaluates it again."""
        path = folder_of_step(self.checkpoints, self.step)
        try:
            note_evaluation(path, self.stop_consensus.fencing_token)
        except (OSError, ValueError) as error:
            self._say(f"warning: {path}: not marked as evaluated ({error}); a resume from it evaluates again")
        except FencedError:
            pass  # the stop consensus ends this attempt on all ranks together

    def _between_batches(self) -> None:
        self._stop_if_agreed()
        self.watchdog.reached(f"evaluating after step {self.step}")

    def _save(self, pauses: Sequence[float], *, required: bool) -> None:
        """Save; after a failure again, after each of the `pauses` in seconds, since the disk may recover. Collective.

        If all of them fail, training goes on without this checkpoint, unless it is `required`.

        Raises:
            UsageError: the disk is not writable, or a required checkpoint could not be saved.
        """
        if self._saved_step == self.step:
            return
        for pause in pauses:
            try:
                self._save_once()
                return
            except SaveError as error:
                self._say(f"warning: {error}; trying again in {pause:g} s")
            self._wait(pause)
        try:
            self._save_once()
        except SaveError as error:
            if required:
                raise
            self._failed_saves = True
            self._say(
                f"warning: {error}; training goes on without a checkpoint of step {self.step}, and ends if the next "
                "one fails as well"
            )

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.watchdog.reached(f"waiting to save after step {self.step} again")
            time.sleep(min(1.0, left))

    def _save_once(self) -> None:
        progress = TrainingProgress(
            step=self.step,
            skipped_steps=self._skipped,
            sequences=self.loader.position,
            tokens=self._tokens,
            gradient_norms=tuple(self.engine.spike_guard.norms),
            evaluation_pending=self._evaluation_pending,
        )
        saving, started = f"saving after step {self.step}", time.perf_counter()
        self.watchdog.reached(saving)
        path = save_checkpoint(
            self.engine,
            self.checkpoints,
            progress,
            self.about,
            # What is saved on a signal while gradients are not finite may be bad: it displaces no good one.
            self.config.checkpoint.keep + self._unsound,
            kept=_due(self.step, self.config.checkpoint.every_steps * self.config.checkpoint.keep_every),
            owner=self.stop_consensus.fencing_token,
            reached=lambda: self.watchdog.reached(saving),
        )
        self._saved_step, self._failed_saves = self.step, False
        self.watchdog.reached("training")
        seconds = time.perf_counter() - started
        self._say(f"step {self.step}: saved {path}")
        for hook in self.hooks:
            hook.on_save(self.step, path, seconds)

    def _say(self, text: str) -> None:
        for hook in self.hooks:
            hook.on_message(text)


def _fault(report: StepReport) -> str:
    return f"norm {report.gradient_norm:g} is a spike" if report.spike else "is not finite"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
