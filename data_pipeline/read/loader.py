"""From the sequences of a dataset to the microbatches of a training step.

The state of a loader is one integer, the number of sequences that finished steps consumed, over all ranks: a run may
stop and go on with another number of data ranks, and every sequence is still seen exactly once per epoch.

Shapes: B sequences in a microbatch, S tokens in a sequence.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from biroute.configs.errors import UsageError
from biroute.data_pipeline.read.manifest import Manifest, Split
from biroute.data_pipeline.read.order import SequenceOrder, SourceSize, choose_positions, derive_key
from biroute.data_pipeline.read.token_stream import TokenStream

_CLOSE_SECONDS = 5.0  # for the thread to notice that it is to stop
_LOOK_SECONDS = 0.2  # between two looks, while data are awaited, at whether they are still wanted


class SequenceReader:
    """The sequences of one split, in the order of training.

    A source's sequences are the windows [i * S, i * S + S + 1) of its token stream: neighbours share one token, which
    is a target in one and only an input in the other.

    Attributes:
        num_sequences: in all sources together; without weights one epoch.
        shares: source name -> its share of the sequences.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        weights: dict[str, float] | None = None,
    ) -> None:
        """Open the shards of one split.

        Args:
            folder: of the dataset.
            manifest: of the same dataset, as `load_manifest` or `verify_dataset` gives it.
            split: train or heldout.
            sequence_length: S, tokens of a sequence.
            seed: of the order.
            weights: relative fractions by name of source; None: every sequence once per epoch.

        Raises:
            UsageError: too few tokens for one sequence; weights for other sources than the dataset has.
        """
        layout = (manifest.tokens_per_sample, manifest.samples_per_shard)
        self.folder = folder
        self.split: Split = split
        self.sequence_length = sequence_length
        names = [source.name for source in manifest.sources]
        if weights is not None and set(weights) != set(names):
            raise UsageError(
                f"data.sources: weights for {', '.join(sorted(weights))}, but {folder} holds {', '.join(names)}; "
                "run `biroute data build` with this configuration"
            )
        sizes, self._streams = [], []
        for source in manifest.sources:
            entry = source.splits[split]
            num_sequences = max(0, entry.tokens - 1) // sequence_length
            if num_sequences:
                sizes.append(SourceSize(source.name, num_sequences))
                self._streams.append(TokenStream(folder, source.name, split, entry, manifest.dtype, layout))
            elif weights is not None:
                raise UsageError(self._too_short(f"the {split} split of source {source.name}", entry.tokens))
        if not sizes:
            raise UsageError(self._too_short(f"the {split} split", manifest.tokens(split)))
        self._order = SequenceOrder(sizes, weights, seed)
        self.num_sequences = self._order.num_sequences
        self.shares = self._order.shares

    def _too_short(self, what: str, tokens: int) -> str:
        remedy = "lower model.sequence_length or give more documents"
        if self.split == "heldout":
            remedy = "lower model.sequence_length, raise data.heldout_fraction or give more documents"
        return (
            f"model.sequence_length={self.sequence_length}: {what} in {self.folder} has {tokens} tokens, fewer than "
            f"one sequence ({self.sequence_length} and one to predict); {remedy}"
        )

    def sequence(self, n: int) -> np.ndarray:
        """The sequence at global position `n` >= 0, epochs following each other; [S + 1] int64."""
        return self.sequences(np.array([n]))[0]

    def sequences(self, positions: np.ndarray) -> np.ndarray:
        """The sequences at `positions` [n]; [n, S + 1] int64."""
        sources, numbers = self._order.locate(positions)
        out = np.empty((len(positions), self.sequence_length + 1), dtype=np.int64)
        for row, source, number in zip(out, sources.tolist(), numbers.tolist(), strict=True):
            start = number * self.sequence_length
            row[:] = self._streams[source].read(start, start + self.sequence_length + 1)
        return out


@dataclass(frozen=True)
class Objective:
    """What a model learns from a sequence.

    kind: 'causal' predicts each next token; 'masked' predicts `masked_tokens` tokens that `mask_id` hides.
    token_bytes: [vocab] UTF-8 bytes of each token.
    seed: of the masking.
    """

    kind: Literal["causal", "mlm"]
    token_bytes: np.ndarray
    mask_id: int | None = None
    masked_tokens: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """One microbatch."""

    inputs: np.ndarray  # [B, S] int64
    labels: np.ndarray  # [B, S] int64
    loss_mask: np.ndarray | None  # [B, S] bool: the labels that the loss counts; None = all of them
    target_bytes: int  # UTF-8 bytes of the labels that count

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What a model takes: inputs, labels, loss mask."""
        return self.inputs, self.labels, self.loss_mask

    @property
    def target_tokens(self) -> int:
        """Labels that count."""
        return int(self.labels.size if self.loss_mask is None else self.loss_mask.sum())


def make_batch(reader: SequenceReader, positions: np.ndarray, objective: Objective) -> Batch:
    """The sequences at `positions` [B] as one microbatch; a pure function of its arguments."""
    tokens = reader.sequences(positions)
    if objective.kind == "causal":
        labels = np.ascontiguousarray(tokens[:, 1:])
        return Batch(np.ascontiguousarray(tokens[:, :-1]), labels, None, int(objective.token_bytes[labels].sum()))
    labels = np.ascontiguousarray(tokens[:, :-1])
    loss_mask = np.zeros(labels.shape, dtype=bool)
    for row, position in enumerate(positions.tolist()):
        key = derive_key("mask", objective.seed, position)
        loss_mask[row, choose_positions(labels.shape[1], objective.masked_tokens, key)] = True
    inputs = labels.copy()
    inputs[loss_mask] = objective.mask_id
    return Batch(inputs, labels, loss_mask, int(objective.token_bytes[labels[loss_mask]].sum()))


@dataclass(frozen=True)
class StepShape:
    """How a step's sequences are shared out; `global_batch_size` is a multiple of microbatch_size x data_size."""

    global_batch_size: int
    microbatch_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        per_pass = self.microbatch_size * self.data_size
        if self.global_batch_size % per_pass or not 0 <= self.data_rank < self.data_size:
            raise ValueError(f"a batch of {self.global_batch_size} does not divide into passes of {per_pass}")

    @property
    def num_microbatches(self) -> int:
        """Of one rank in one step."""
        return self.global_batch_size // (self.microbatch_size * self.data_size)

    def positions(self, step_begin: int, microbatch: int) -> np.ndarray:
        """Global positions of one microbatch of this rank, [microbatch_size] int64."""
        begin = step_begin + (microbatch * self.data_size + self.data_rank) * self.microbatch_size
        return np.arange(begin, begin + self.microbatch_size, dtype=np.int64)


class MicrobatchLoader:
    """The microbatches of step after step for one data rank, prepared by a thread some steps ahead.

    Attributes:
        position: sequences consumed by the steps taken, over all ranks: the whole state.
        wait_seconds: time waited for the thread, so far.
    """

    def __init__(
        self,
        reader: SequenceReader,
        *,
        objective: Objective,
        global_batch_size: int,
        microbatch_size: int,
        data_rank: int,
        data_size: int,
        position: int = 0,
        prefetch_steps: int = 2,
    ) -> None:
        self._reader = reader
        self._objective = objective
        self._shape = StepShape(global_batch_size, microbatch_size, data_rank, data_size)
        self.position = position
        self.wait_seconds = 0.0
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, prefetch_steps))
        self._ready: list[Batch] | BaseException | None = None  # taken from the queue, not yet asked for
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._prepare, args=(position,), name="microbatches", daemon=True)
        self._thread.start()

    @property
    def microbatches_per_step(self) -> int:
        """Length of what `step` returns."""
        return self._shape.num_microbatches

    def wait(self, give_up: Callable[[], object]) -> bool:
        """Wait until `step` need not; False if `give_up()` becomes true before that."""
        while self._ready is None and self._failure is None and not self._stop.is_set():
            started = time.perf_counter()
            try:
                self._ready = self._queue.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if give_up():
                    return False
            finally:
                self.wait_seconds += time.perf_counter() - started
        return True

    def step(self) -> list[Batch]:
        """The microbatches of the next optimizer step; `position` moves on by the global batch.

        Raises:
            UsageError: a shard has gone since the dataset was opened, say: whatever the thread met.
            RuntimeError: the loader is closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        self.wait(lambda: False)
        item, self._ready = self._ready, None
        assert item is not None
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self.position += self._shape.global_batch_size
        return item

    def close(self) -> None:
        """Stop the thread; may be called again. A thread whose disk does not answer is left behind."""
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.get_nowait()  # makes room for a thread that waits to put
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> MicrobatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare(self, position: int) -> None:
        try:
            while not self._stop.is_set():
                batches = []
                for microbatch in range(self._shape.num_microbatches):
                    if self._stop.is_set():
                        return
                    positions = self._shape.positions(position, microbatch)
                    batches.append(make_batch(self._reader, positions, self._objective))
                position += self._shape.global_batch_size
                self._queue.put(batches)
        except BaseException as error:
            self._queue.put(error)


def check_evaluate_sequences(reader: SequenceReader, wanted: int) -> None:
    """Does the held-out split have `wanted` different sequences?

    Raises:
        UsageError: it does not.
    """
    if wanted > reader.num_sequences:
        raise UsageError(
            f"train.evaluate_sequences={wanted}, but the held-out split of {reader.folder} has only "
            f"{reader.num_sequences} sequences of {reader.sequence_length} tokens; lower "
            f"train.evaluate_sequences to at most {reader.num_sequences} or raise data.heldout_fraction"
        )


class HeldoutBatches:
    """A fixed set of held-out sequences, the first `num_sequences`, shared out to the data ranks; iterate at will."""

    def __init__(self, reader: SequenceReader, objective: Objective, shape: StepShape) -> None:
        """`shape.global_batch_size` is the number of sequences over all ranks.

        Raises:
            UsageError: the held-out split has fewer.
        """
        check_evaluate_sequences(reader, shape.global_batch_size)
        self._reader = reader
        self._objective = objective
        self._shape = shape

    def __len__(self) -> int:
        return self._shape.num_microbatches

    def __iter__(self) -> Iterator[Batch]:
        for microbatch in range(len(self)):
            yield make_batch(self._reader, self._shape.positions(0, microbatch), self._objective)
