"""Read the sequences of a dataset and assemble them into the microbatches of each training step.

The state of a loader is one integer: the number of sequences that all ranks consumed in the finished steps. A run can
therefore stop and resume with a different number of data ranks, and still uses every sequence exactly once per epoch.

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
from biroute.data_pipeline.read.order import SequenceOrder, SourceSize
from biroute.data_pipeline.read.permutation import choose_positions, derive_key
from biroute.data_pipeline.read.token_stream import TokenStream

_CLOSE_SECONDS = 5.0  # how long `close` waits for the thread
_LOOK_SECONDS = 0.2  # interval of calls to `give_up` while waiting for data


class SequenceReader:
    """The sequences of one split, in training order.

    Sequence i of a source is the window [i * S, i * S + S + 1) of its token stream. Consecutive sequences overlap by
    one token, which is a target in the first and only an input in the second.

    Attributes:
        num_sequences: sequences of all sources together; without weights, the length of an epoch.
        shares: for each source name, its fraction of the sequences.
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
            folder: the dataset's folder.
            manifest: the manifest of the same dataset, from `load_manifest` or `verify_dataset`.
            split: "train" or "heldout".
            sequence_length: tokens of a sequence (S).
            seed: seed of the order.
            weights: relative weight of each source by name; None to use every sequence once per epoch.

        Raises:
            UsageError: there are too few tokens for one sequence, or the weights name other sources than the dataset.
        """
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
                self._streams.append(TokenStream(folder, manifest, source, split))
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
        """Return the sequence at global position `n` >= 0, counted on across epochs: [S + 1] int64."""
        return self.sequences(np.array([n]))[0]

    def sequences(self, positions: np.ndarray) -> np.ndarray:
        """Return the sequences at `positions` [n]: [n, S + 1] int64."""
        sources, numbers = self._order.locate(positions)
        out = np.empty((len(positions), self.sequence_length + 1), dtype=np.int64)
        for row, source, number in zip(out, sources.tolist(), numbers.tolist(), strict=True):
            start = number * self.sequence_length
            row[:] = self._streams[source].read(start, start + self.sequence_length + 1)
        return out


@dataclass(frozen=True)
class Objective:
    """What a model learns from a sequence.

    Attributes:
        kind: "causal" predicts each next token, "mlm" predicts `masked_tokens` tokens that `mask_id` replaces.
        token_bytes: [vocab] UTF-8 bytes of each token.
        mask_id: id of the mask token; only for "mlm".
        masked_tokens: number of masked tokens in each sequence; only for "mlm".
        seed: seed of the masking.
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
        """The arguments of a model and its loss: inputs, labels, loss mask."""
        return self.inputs, self.labels, self.loss_mask

    @property
    def target_tokens(self) -> int:
        """Number of labels that the loss counts."""
        return int(self.labels.size if self.loss_mask is None else self.loss_mask.sum())


def make_batch(reader: SequenceReader, positions: np.ndarray, objective: Objective) -> Batch:
    """Assemble the sequences at `positions` [B] into one microbatch; a pure function of its arguments."""
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
    """How a step's sequences are split among data ranks and microbatches.

    `global_batch_size` must be a multiple of microbatch_size x data_size.
    """

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
        """Number of microbatches of one rank in one step."""
        return self.global_batch_size // (self.microbatch_size * self.data_size)

    def positions(self, step_begin: int, microbatch: int) -> np.ndarray:
        """Return the global positions of one microbatch of this rank: [microbatch_size] int64."""
        begin = step_begin + (microbatch * self.data_size + self.data_rank) * self.microbatch_size
        return np.arange(begin, begin + self.microbatch_size, dtype=np.int64)


class MicrobatchLoader:
    """The microbatches of one data rank, step by step; a thread prepares them some steps ahead.

    Attributes:
        position: sequences that all ranks consumed in the steps taken so far; this is the whole state.
        wait_seconds: total time spent waiting for the thread.
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
        self._ready: list[Batch] | BaseException | None = None  # taken from the queue, not yet returned by `step`
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._prepare, args=(position,), name="microbatches", daemon=True)
        self._thread.start()

    @property
    def microbatches_per_step(self) -> int:
        """Length of the list that `step` returns."""
        return self._shape.num_microbatches

    def wait(self, give_up: Callable[[], object]) -> bool:
        """Wait until `step` can return without waiting; returns False if `give_up()` becomes true before that."""
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
        """Return the microbatches of the next optimizer step and advance `position` by the global batch size.

        Raises:
            UsageError: the data could not be read; for example, a shard was removed after the dataset was opened.
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
        """Stop the thread; can be called repeatedly. A thread that waits for a hanging disk is abandoned."""
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.get_nowait()  # unblocks a thread that waits for room in the queue
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
    """Check that the held-out split has at least `wanted` sequences.

    Raises:
        UsageError: it has fewer.
    """
    if wanted > reader.num_sequences:
        raise UsageError(
            f"train.evaluate_sequences={wanted}, but the held-out split of {reader.folder} has only "
            f"{reader.num_sequences} sequences of {reader.sequence_length} tokens; lower "
            f"train.evaluate_sequences to at most {reader.num_sequences} or raise data.heldout_fraction"
        )


class HeldoutBatches:
    """The first sequences of the held-out split, divided among the data ranks; can be iterated repeatedly."""

    def __init__(self, reader: SequenceReader, objective: Objective, shape: StepShape) -> None:
        """Select `shape.global_batch_size` sequences over all ranks.

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
