"""`manifest.json`: the content of a dataset, from which every missing or changed file is noticed.

Two numbers are the index of a shard: samples are equally spaced in the tar file, so the data of sample i begins at
`first_data_offset + i * sample_stride`.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from biroute.configs.errors import DISK_FULL, UsageError
from biroute.configs.files import open_regular

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
WORK_NAME = ".work"  # no source can have this name
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Entry):
    """One tar file."""

    # Relative to the dataset's folder. The pattern keeps it inside, since builds delete listed files that are stale.
    file: str = Field(pattern=r"^[A-Za-z0-9_-]+/(train|heldout)-[0-9]+\.tar$")
    size_bytes: PositiveInt
    sha256: str
    samples: PositiveInt
    tokens: PositiveInt
    documents: NonNegativeInt  # documents that begin in this shard
    text_bytes: NonNegativeInt  # UTF-8 bytes of its tokens
    first_data_offset: PositiveInt  # bytes from the start of the file to the first token
    sample_stride: PositiveInt  # bytes from the first token of one sample to that of the next


class SplitEntry(_Entry):
    """The training or held-out part of a source: a stream of documents, each ended by eos, cut into samples."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    text_bytes: NonNegativeInt
    shards: tuple[ShardEntry, ...]

    @model_validator(mode="after")
    def _check(self) -> SplitEntry:
        for field in ("documents", "tokens", "text_bytes"):
            if sum(getattr(shard, field) for shard in self.shards) != getattr(self, field):
                raise ValueError(f"{field} of the shards do not add up")
        return self


class SourceEntry(_Entry):
    """One source. `key` is a hash of everything that its shards depend on."""

    name: str
    key: str
    counts: dict[str, int]  # fields of sources.SourceCounts
    splits: dict[Split, SplitEntry]


class Manifest(_Entry):
    """A whole dataset. `settings` are the values of the configuration that determined its content."""

    format: Literal["biroute-dataset-1"] = "biroute-dataset-1"
    tokenizer_fingerprint: str
    tokenizer_key: str
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    tokens_per_sample: PositiveInt
    samples_per_shard: PositiveInt
    settings: dict[str, str]
    sources: tuple[SourceEntry, ...]
    checksum: str = ""  # of all the fields above; set by `sealed`

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        itemsize = 2 if self.dtype == "uint16" else 4
        if self.vocab_size > 1 << 8 * itemsize or self.eos_id >= self.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size} does not fit dtype={self.dtype} and eos_id={self.eos_id}")
        for source in self.sources:
            for split in SPLITS:
                shards = source.splits[split].shards
                for number, shard in enumerate(shards):
                    self._check_index(shard, itemsize, last=number + 1 == len(shards))
                    if shard.file != f"{source.name}/{split}-{number:06d}.tar":
                        raise ValueError(f"{shard.file} is listed as shard {number} of {source.name}/{split}")
        return self

    def _check_index(self, shard: ShardEntry, itemsize: int, *, last: bool) -> None:
        """Check that the samples of a shard, as training computes their places, lie in its file one after another."""
        whole = shard.samples * self.tokens_per_sample
        fewest = whole - self.tokens_per_sample + 1 if last else whole
        full = shard.samples == self.samples_per_shard or (last and shard.samples < self.samples_per_shard)
        if not (full and fewest <= shard.tokens <= whole):
            raise ValueError(
                f"{shard.file}: {shard.samples} samples of {shard.tokens} tokens do not fit samples_per_shard="
                f"{self.samples_per_shard} and tokens_per_sample={self.tokens_per_sample}"
            )
        before = (shard.samples - 1) * self.tokens_per_sample  # tokens of all samples but the last
        end = shard.first_data_offset + (shard.samples - 1) * shard.sample_stride + (shard.tokens - before) * itemsize
        if end > shard.size_bytes or (before and shard.sample_stride < self.tokens_per_sample * itemsize):
            raise ValueError(
                f"{shard.file}: first_data_offset={shard.first_data_offset} and sample_stride={shard.sample_stride} "
                "lead outside of the file or into the sample before"
            )

    def content_checksum(self) -> str:
        """Return the SHA-256 of all fields but the checksum itself."""
        content = json.dumps(self.model_dump(mode="json", exclude={"checksum"}), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def tokens_checksum(self) -> str:
        """Return a hash of the sources' names and shards: of everything that training reads, however it was built."""
        names = [
            (source.name, split, [shard.sha256 for shard in source.splits[split].shards])
            for source in self.sources
            for split in SPLITS
        ]
        return hashlib.sha256(json.dumps(names).encode("utf-8")).hexdigest()

    def sealed(self) -> Manifest:
        """Return the same manifest with the right checksum."""
        return self.model_copy(update={"checksum": self.content_checksum()})

    def tokens(self, split: Split) -> int:
        """Return the number of tokens of a split over all sources."""
        return sum(source.splits[split].tokens for source in self.sources)

    def left_out(self, sequence_length: int) -> list[str]:
        """Return a warning for each source that is too short for one sequence, so that no run ever reads it."""
        return [
            f"warning: source {source.name} is left out of {'training' if split == 'train' else 'evaluation'}: its "
            f"{source.splits[split].tokens:,} tokens of {self.tokens(split):,} are fewer than one sequence and one "
            f"to predict (model.sequence_length={sequence_length})"
            for source in self.sources
            for split in SPLITS
            if 0 < source.splits[split].tokens <= sequence_length
        ]

    def shards(self) -> Iterator[ShardEntry]:
        """Yield every shard, source by source, training before held-out."""
        for source in self.sources:
            for split in SPLITS:
                yield from source.splits[split].shards


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of the dataset in `folder`.

    Raises:
        UsageError: there is no dataset, it is unfinished, or its manifest is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        with open_regular(path) as file:  # of any size: that of a trillion tokens has 80 MB
            manifest = Manifest.model_validate_json(file.read())
    except FileNotFoundError:
        state = "is not finished" if (folder / WORK_NAME).exists() else "holds no dataset"
        raise UsageError(f"data.dir={folder} {state}; run `biroute data build` with this configuration") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UsageError(
            f"{path}: damaged or of another version ({where}: {first['msg']}); remove it and run `biroute data build`"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if manifest.checksum != manifest.content_checksum():
        raise UsageError(
            f"{path}: damaged, changed by hand or of another version (its checksum does not fit its content); remove "
            "it and run `biroute data build`"
        )
    return manifest


def to_json(entry: BaseModel) -> bytes:
    """Format an entry as indented JSON; equal entries give equal bytes."""
    return (json.dumps(entry.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode("utf-8")


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk or of a folder that is not writable into a UsageError that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UsageError(
                f"data.dir={folder}: the disk is full ({error.strerror}); free some space and run the same command "
                "again to continue, or set data.dir to another disk"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UsageError(
                f"data.dir={folder}: cannot write {error.filename2 or error.filename or 'there'} ({error.strerror}); "
                "set data.dir to a folder of your own"
            ) from None
        raise
