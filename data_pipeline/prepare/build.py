"""`biroute data build`: build a dataset from text sources.

The stages are: scan the sources; train the tokenizer; then, for each source, tokenize it into parts (in parallel, one
file per part) and write the shards. Every result is written atomically and carries a hash of everything that it
depends on. An interrupted build therefore continues from its last results, and after a change only the affected
stages are repeated:

- A different file, size or time stamp in a source, or different document limits: with a trained tokenizer the whole
  dataset, with a given one (`data.tokenizer.model_path`) only that source.
- `tokens_per_sample`, `samples_per_shard`: the shards; the tokenizer is kept.
- `weight`, `workers`, `seed`: nothing, since they are not part of the dataset. (Weights only affect the sample on
  which a new tokenizer is trained.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biroute.configs.data_section import DataConfig, SourceConfig
from biroute.configs.errors import UsageError
from biroute.configs.files import file_lock, write_atomically
from biroute.configs.records import parse_json, read_small
from biroute.data_pipeline.prepare.child_process import call_in_child
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.source_build import SourceBuild, is_whole, token_dtype
from biroute.data_pipeline.prepare.sources import (
    SourceCounts,
    SourceFile,
    read_documents,
    resolve_files,
    with_heldout_fraction,
)
from biroute.data_pipeline.prepare.tokenizer import (
    Tokenizer,
    TrainingSample,
    load_tokenizer,
    train_model,
    train_tokenizer,
)
from biroute.data_pipeline.read.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    WORK_NAME,
    Manifest,
    SourceEntry,
    Split,
    explain_write_errors,
    load_manifest,
    to_json,
)

_VERSION = 1  # changes all keys; to be raised when equal settings give different results
_CHILD_FROM_BYTES = 1_000_000  # of a sample; a tokenizer of less is trained in a second
_FEW_DOCUMENTS = 10_000  # are read again for an error's remedy
_HELDOUT_DOCUMENTS = 5  # so many are expected to be held out with the fraction that an error proposes
_TOKENIZER_RECORD = "tokenizer.json"


@dataclass(frozen=True)
class BuildResult:
    """The result of a build; `rebuilt` names the sources whose shards were written, and is empty if none changed."""

    manifest: Manifest
    rebuilt: tuple[str, ...]
    seconds: float


def build_dataset(data: DataConfig, progress: Progress | None = None) -> BuildResult:
    """Build the dataset in `data.dir`, or continue or update an earlier build.

    Raises:
        UsageError: the sources, settings or texts are not usable, the disk is full, or another build uses the folder.
    """
    started = time.monotonic()
    if not data.sources:
        raise UsageError("data.sources is empty; name at least one source of documents")
    build = _Build(data, progress or Progress())  # a mistyped path leaves no empty folder behind
    with explain_write_errors(data.dir):
        _make_folder(data.dir)
        with _lock(data.dir):
            manifest, rebuilt = build.run()
    return BuildResult(manifest, rebuilt, time.monotonic() - started)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # its parent is there, but makes no folders, as /proc
        raise PermissionError(errno.EPERM, error.strerror, error.filename) from None


def dataset_settings(data: DataConfig) -> dict[str, str]:
    """Return the settings that determine a dataset's content (besides the source files), by dotted field name."""
    settings = {
        "data.sources": ", ".join(source.name for source in data.sources),
        "data.min_document_bytes": repr(data.min_document_bytes),
        "data.max_document_bytes": repr(data.max_document_bytes),
        "data.tokenizer.vocab_size": repr(data.tokenizer.vocab_size),
    }
    if data.heldout_fraction is not None:
        settings["data.heldout_fraction"] = repr(data.heldout_fraction)
    if data.tokenizer.model_path is None:
        for field in ("kind", "character_coverage", "training_bytes"):
            settings[f"data.tokenizer.{field}"] = str(getattr(data.tokenizer, field))
    return settings


class _Build:
    def __init__(self, data: DataConfig, progress: Progress) -> None:
        self._files = {source.name: resolve_files(source) for source in data.sources}
        self._data = data = with_heldout_fraction(data, self._total_bytes(data.sources))
        self._progress = progress
        self._folder = data.dir
        self._work = data.dir / WORK_NAME
        self._given: Tokenizer | None = None
        if data.tokenizer.model_path is not None:
            self._given = load_tokenizer(data.tokenizer.model_path, data.tokenizer.vocab_size)
        self._tokenizer_key = self._make_tokenizer_key()
        self._previous: Manifest | None = None

    def run(self) -> tuple[Manifest, tuple[str, ...]]:
        self._previous = self._load_previous()
        if self._previous is not None and self._is_current(self._previous):
            shutil.rmtree(self._work, ignore_errors=True)  # an interruption after the manifest was written
            return self._previous, ()
        self._work.mkdir(exist_ok=True)
        if (self._folder / MANIFEST_NAME).exists():
            # Without a manifest, the folder does not count as a dataset until the build is complete.
            (self._folder / MANIFEST_NAME).replace(self._work / MANIFEST_NAME)
        tokenizer = self._tokenizer()
        keys = {source.name: self._source_key(source, tokenizer.fingerprint) for source in self._data.sources}
        entries, rebuilt = [], []
        for source in self._data.sources:
            entry = self._kept_entry(source.name, keys[source.name])
            if entry is None:
                entry = self._build_source(source, keys[source.name], tokenizer)
                rebuilt.append(source.name)
            entries.append(entry)
        documents = {split: sum(entry.splits[split].documents for entry in entries) for split in SPLITS}
        for split in SPLITS:
            self._check_documents(split, documents[split], sum(documents.values()))
        manifest = Manifest(
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_key=self._tokenizer_key,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=token_dtype(tokenizer.vocab_size),
            tokens_per_sample=self._data.tokens_per_sample,
            samples_per_shard=self._data.samples_per_shard,
            settings=dataset_settings(self._data),
            sources=tuple(entries),
        ).sealed()
        self._remove_stale_shards(manifest)
        write_atomically(self._folder / MANIFEST_NAME, to_json(manifest))
        shutil.rmtree(self._work)
        return manifest, tuple(rebuilt)

    def _build_source(self, source: SourceConfig, key: str, tokenizer: Tokenizer) -> SourceEntry:
        self._forget(source.name, key)
        return SourceBuild(self._data, source, self._total_bytes([source]), key, tokenizer, self._progress).run()

    # Results of earlier builds

    def _load_previous(self) -> Manifest | None:
        for folder in (self._folder, self._work):
            if (folder / MANIFEST_NAME).exists():
                try:
                    return load_manifest(folder)
                except UsageError as error:  # none of it can be trusted, so everything is built again
                    self._progress.note(f"warning: {error}")
        return None

    def _is_current(self, manifest: Manifest) -> bool:
        if not (self._folder / MANIFEST_NAME).exists() or manifest.tokenizer_key != self._tokenizer_key:
            return False
        keys = [self._source_key(source, manifest.tokenizer_fingerprint) for source in self._data.sources]
        if manifest.settings != dataset_settings(self._data) or [entry.key for entry in manifest.sources] != keys:
            return False
        tokenizer = self._stored_tokenizer()
        return (
            tokenizer is not None
            and tokenizer.fingerprint == manifest.tokenizer_fingerprint
            and all(is_whole(self._folder, shard, self._progress) for shard in manifest.shards())
        )

    def _kept_entry(self, name: str, key: str) -> SourceEntry | None:
        """Return the entry of a source that an earlier build finished, if nothing that it depends on has changed."""
        candidates = [entry for entry in self._previous.sources if entry.key == key] if self._previous else []
        record = self._work / f"{name}@{key}.json"
        with contextlib.suppress(OSError, ValueError):  # not made yet, or damaged
            candidates.append(SourceEntry.model_validate_json(read_small(record)))
        for entry in candidates:
            if all(
                is_whole(self._folder, shard, self._progress)
                for split in SPLITS
                for shard in entry.splits[split].shards
            ):
                return entry
        return None

    def _forget(self, name: str, key: str) -> None:
        """Delete all records of other versions of a source, since its shards are about to be overwritten."""
        for path in self._work.glob(f"{name}@*"):
            if path.name != f"{name}@{key}":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._previous is not None and any(entry.name == name for entry in self._previous.sources):
            kept = tuple(entry for entry in self._previous.sources if entry.name != name)
            self._previous = self._previous.model_copy(update={"sources": kept}).sealed()
            write_atomically(self._work / MANIFEST_NAME, to_json(self._previous))

    def _remove_stale_shards(self, manifest: Manifest) -> None:
        """Delete shards of an earlier version of the dataset, listed or not, that the new manifest does not list."""
        current = {shard.file for shard in manifest.shards()}
        stale = {shard.file for shard in self._previous.shards()} if self._previous else set()
        for source in manifest.sources:
            found = (self._folder / source.name).glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar")
            stale |= {f"{source.name}/{path.name}" for path in found}
        for file in stale - current:
            (self._folder / file).unlink(missing_ok=True)

    # The tokenizer

    def _make_tokenizer_key(self) -> str:
        if self._given is not None:
            return _key("given", self._given.fingerprint)
        config = self._data.tokenizer
        texts = [(self._files[source.name], source.text_field) for source in self._data.sources]
        settings = (config.kind, config.vocab_size, config.character_coverage, config.training_bytes)
        return _key("trained", settings, texts, self._document_settings())

    def _source_key(self, source: SourceConfig, fingerprint: str) -> str:
        layout = (self._data.tokens_per_sample, self._data.samples_per_shard)
        files = self._files[source.name]
        return _key(source.name, files, source.text_field, self._document_settings(), fingerprint, layout)

    def _document_settings(self) -> tuple[Any, ...]:
        return (self._data.heldout_fraction, self._data.min_document_bytes, self._data.max_document_bytes)

    def _stored_tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer from the dataset's folder; None if it is not the one that the configuration asks for."""
        try:
            record = parse_json(read_small(self._folder / _TOKENIZER_RECORD))
            tokenizer = load_tokenizer(self._folder / TOKENIZER_NAME)
        except (UsageError, OSError, ValueError):
            return None
        expected = {"key": self._tokenizer_key, "fingerprint": tokenizer.fingerprint}
        return tokenizer if record == expected else None

    def _tokenizer(self) -> Tokenizer:
        stored = self._stored_tokenizer()
        if stored is not None:
            return stored
        tokenizer = self._given or self._train_tokenizer()
        write_atomically(self._folder / TOKENIZER_NAME, tokenizer.model_bytes)
        record = {"key": self._tokenizer_key, "fingerprint": tokenizer.fingerprint}
        write_atomically(self._folder / _TOKENIZER_RECORD, json.dumps(record).encode())
        return tokenizer

    def _train_tokenizer(self) -> Tokenizer:
        config = self._data.tokenizer
        samples = self._samples(config.training_bytes)
        documents = dict.fromkeys(SPLITS, 0)
        with self._progress.stage("reading the sources", self._total_bytes(self._data.sources)) as update:
            done = 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                update(done)

            for source in self._data.sources:
                for document in read_documents(source, self._data, SourceCounts(), on_bytes):
                    documents["heldout" if document.heldout else "train"] += 1
                    samples[source.name].add(document)
        for split in SPLITS:  # fails before the training of the tokenizer, not after it
            self._check_documents(split, documents[split], sum(documents.values()))
        distinct = {id(sample): sample for sample in samples.values()}.values()
        size = sum(sample.size_bytes for sample in distinct)
        what = f"{config.kind} tokenizer of {config.vocab_size} pieces"
        self._progress.note(f"training a {what} on {size / 1e6:.1f} MB")
        texts = [text for sample in distinct for text in sample.texts()]
        if size <= _CHILD_FROM_BYTES:  # starting a process takes longer
            return train_tokenizer(texts, config)
        with self._progress.clock("training the tokenizer") as waiting:
            return Tokenizer(call_in_child(waiting, train_model, texts, config), "the trained tokenizer")

    def _samples(self, budget: int) -> dict[str, TrainingSample]:
        """Create the samples for training the tokenizer: one for all sources together, or one each with weights."""
        weights = [source.weight for source in self._data.sources if source.weight is not None]
        if not weights:
            return dict.fromkeys((source.name for source in self._data.sources), TrainingSample(budget))
        return {
            source.name: TrainingSample(max(1, round(budget * source.weight / sum(weights))))
            for source in self._data.sources
            if source.weight is not None
        }

    def _check_documents(self, split: Split, documents: int, total: int) -> None:
        fraction = self._data.heldout_fraction
        if documents or (split == "heldout" and fraction == 0):
            return
        what = "no document for the held-out split" if split == "heldout" else "no document to train on"
        raise UsageError(
            f"data.heldout_fraction={fraction} leaves {what}; {self._heldout_remedy(split, total)}, give more "
            "documents, or lower data.max_document_bytes so that long ones are split"
        )

    def _heldout_remedy(self, empty: Split, total: int) -> str:
        """Return how to change the fraction so that both splits have documents."""
        if total == 1:
            return "set it to 0 to train without one" if empty == "heldout" else "set it to 0"
        if total > _FEW_DOCUMENTS:
            enough = math.ceil(1000 * _HELDOUT_DOCUMENTS / total) / 1000
            return f"raise it, such as to {enough:g} of these {total}" if empty == "heldout" else "lower it"
        # Which documents a fraction holds out is known: about a tenth of them, at least one, not all.
        draws = sorted(
            {
                document.heldout_above
                for source in self._data.sources
                for document in read_documents(source, self._data, SourceCounts(), lambda _: None)
            }
        )
        if len(draws) == 1:
            return "set it to 0, since these documents are all the same one"
        number = max(1, len(draws) // 10)
        between = (draws[number - 1] + draws[number]) / 2
        shortest = next(
            round(between, n) for n in range(2, 18) if draws[number - 1] < round(between, n) < draws[number]
        )
        return f"set it to {shortest}, which holds out {number} of these {len(draws)}"

    def _total_bytes(self, sources: Iterable[SourceConfig]) -> int:
        return sum(file.size_bytes for source in sources for file in self._files[source.name])


def _key(*parts: Sequence[Any] | str | SourceFile) -> str:
    text = json.dumps([_VERSION, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Allow only one build at a time in a folder."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / ".lock", 0, required=True))
        except TimeoutError:
            raise UsageError(f"data.dir={folder}: another build is running there; wait for it or stop it") from None
        yield
