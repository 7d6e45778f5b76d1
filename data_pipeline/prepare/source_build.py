"""One source of `biroute data build`: its texts become parts of tokens (in parallel), the parts become shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from biroute.configs.data_section import DataConfig, SourceConfig
from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.configs.records import parse_json, read_small, record_of
from biroute.data_pipeline.prepare.encode import PartEncoder, Texts, read_part
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.shard_writer import write_stream
from biroute.data_pipeline.prepare.sources import SourceCounts, read_documents
from biroute.data_pipeline.prepare.tokenizer import Tokenizer
from biroute.data_pipeline.read.manifest import (
    SPLITS,
    TOKENIZER_NAME,
    WORK_NAME,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    to_json,
)
from biroute.data_pipeline.read.token_stream import open_shard

PART_BYTES = 2_000_000  # text in one part; it takes about half a second to tokenize


class SourceBuild:
    """Tokenizes one source into parts and then writes its shards."""

    def __init__(
        self,
        data: DataConfig,
        source: SourceConfig,
        total_bytes: int,
        key: str,
        tokenizer: Tokenizer,
        progress: Progress,
    ) -> None:
        """Prepare the build of `source`, whose files have `total_bytes`; `key` hashes all that it depends on."""
        self._data, self._source, self._key = data, source, key
        self._total_bytes, self._tokenizer, self._progress = total_bytes, tokenizer, progress
        self._folder = data.dir
        self._work = data.dir / WORK_NAME
        self._parts = self._work / f"{source.name}@{key}"

    def run(self) -> SourceEntry:
        """Continue or begin the build; returns what the manifest says of the source.

        Raises:
            UsageError: a file or document is not usable, or a worker was killed.
            OSError: the disk refused.
        """
        self._parts.mkdir(exist_ok=True)
        summary = self._parts / f"summary-{PART_BYTES}.json"
        done = _read_summary(summary)
        if done is None:
            num_parts, counts = self._tokenise()
            done = _Summary(num_parts, counts.as_dict())
            write_atomically(summary, json.dumps(asdict(done)).encode())
        splits = {split: self._write_split(split, done.parts) for split in SPLITS}
        entry = SourceEntry(name=self._source.name, key=self._key, counts=done.counts, splits=splits)
        write_atomically(self._parts.with_name(f"{self._parts.name}.json"), to_json(entry))
        shutil.rmtree(self._parts)
        return entry

    def _part(self, number: int) -> Path:
        # The name contains the grouping, so that parts that another version left with another one are not used.
        return self._parts / f"part-{PART_BYTES}-{number:06d}.npz"

    def _tokenise(self) -> tuple[int, SourceCounts]:
        counts = SourceCounts()
        read_bytes = number = 0

        def on_bytes(count: int) -> None:
            nonlocal read_bytes
            read_bytes += count

        title = f"tokenising {self._source.name}"
        total = self._total_bytes
        model = self._folder / TOKENIZER_NAME
        dtype = token_dtype(self._tokenizer.vocab_size)
        workers = 1 if total <= PART_BYTES else self._data.workers  # for little text, starting processes takes longer
        with (
            self._progress.stage(title, total) as update,
            PartEncoder(model, dtype, workers, update) as encoder,
        ):
            documents = read_documents(self._source, self._data, counts, on_bytes)
            for texts in group_documents(documents):
                path = self._part(number)
                number += 1
                if not path.exists():
                    encoder.submit(path, texts, read_bytes)
            encoder.drain()
            update(total)
        for example in counts.examples:
            self._progress.note(f"warning: {example}; the line is skipped")
        return number, counts

    def _write_split(self, split: Split, num_parts: int) -> SplitEntry:
        def record(number: int) -> Path:
            return self._parts / f"{split}-{number:06d}.json"

        def done(number: int) -> ShardEntry | None:
            try:
                entry = ShardEntry.model_validate_json(read_small(record(number)))
            except (OSError, ValueError):  # not made yet, or damaged
                return None
            return entry if is_whole(self._folder, entry, self._progress) else None

        return write_stream(
            self._folder,
            self._source.name,
            split,
            (read_part(self._part(number), split) for number in range(num_parts)),
            (self._data.tokens_per_sample, self._data.samples_per_shard),
            self._tokenizer.eos_id,
            self._tokenizer.token_bytes(),
            done,
            lambda number, entry: write_atomically(record(number), to_json(entry)),
        )


@dataclass(frozen=True)
class _Summary:
    """What tokenizing a source has left."""

    parts: int
    counts: dict[str, int]


def _read_summary(path: Path) -> _Summary | None:
    try:
        return record_of(_Summary, parse_json(read_small(path)))
    except (OSError, ValueError):  # not made yet, or damaged
        return None


def group_documents(documents: Iterable[Any]) -> Iterator[Texts]:
    """Group documents into at least PART_BYTES of text each; the shards do not depend on the grouping."""
    group, size = Texts([], []), 0
    for document in documents:
        group.texts.append(document.text)
        group.heldout.append(document.heldout)
        size += document.size_bytes
        if size >= PART_BYTES:
            yield group
            group, size = Texts([], []), 0
    if group.texts:
        yield group


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest data type that can represent every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_whole(folder: Path, shard: ShardEntry, progress: Progress) -> bool:
    """Return whether a shard of an earlier build is there; what is wrong with it is said."""
    try:
        open_shard(folder, shard).close()
    except UsageError as error:
        progress.note(f"warning: {error}")
        return False
    return True
