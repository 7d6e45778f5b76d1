"""Random access to the tokens of a dataset through memory maps of its WebDataset shards."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from biroute.configs.errors import UsageError
from biroute.configs.files import open_regular
from biroute.configs.records import parse_json
from biroute.data_pipeline.read.manifest import MANIFEST_NAME, Manifest, ShardEntry, SourceEntry, Split

_TAR_BLOCK = 512
# Maps that one reader keeps open; Linux allows a process 65,530.
_MAX_OPEN_SHARDS = 512
# Manifest and checksum -> state of the file that had it, so that a long manifest is not parsed again for each shard.
_found_right: dict[tuple[Path, str], tuple[int, int, int, int]] = {}


def sample_key(source: str, split: str, index: int) -> str:
    """Return the WebDataset key of a sample. It has no dot, since webdataset reads what follows a dot as the type."""
    return f"{source}-{split}-{index:09d}"


class TokenStream:
    """Random access to the tokens of one split of a source, through memory maps of its shards."""

    def __init__(self, folder: Path, manifest: Manifest, source: SourceEntry, split: Split):
        """Open a split.

        Args:
            folder: the dataset's folder.
            manifest: its manifest.
            source: the source's entry in the manifest.
            split: "train" or "heldout".
        """
        self._folder = folder
        self.manifest = manifest
        self._name = source.name
        self._split = split
        self._shards = source.splits[split].shards
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.num_tokens = source.splits[split].tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens start ... stop - 1 of the stream: [stop - start] int64.

        Raises:
            IndexError: the range is not inside the stream.
            UsageError: a shard was removed, replaced or damaged, or the dataset was built again.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} ... {stop} of a stream of {self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            sample, offset = divmod(position, self.manifest.tokens_per_sample)
            count = min(stop - position, self.manifest.tokens_per_sample - offset)
            out[position - start : position - start + count] = self._read_sample(sample, offset, count)
            position += count
        if len(out) and out.max() >= self.manifest.vocab_size:
            raise UsageError(self._explain_token(out, start))
        return out

    def _read_sample(self, sample: int, offset: int, count: int) -> np.ndarray:
        number, index = divmod(sample, self.manifest.samples_per_shard)
        shard = self._shards[number]
        begin = shard.first_data_offset + index * shard.sample_stride + offset * self._dtype.itemsize
        return np.frombuffer(self._map(number), dtype=self._dtype, count=count, offset=begin)

    def _map(self, number: int) -> mmap.mmap:
        found = self._maps.pop(number, None)
        if found is not None and found.size() >= len(found):  # or it was cut short since: reading it would be SIGBUS
            self._maps[number] = found
            return found
        shard = self._shards[number]
        with open_shard(self._folder, shard) as file:
            first = sample_key(self._name, self._split, number * self.manifest.samples_per_shard)
            check_header(file, self._folder / shard.file, first)
            # After opening: a build takes the manifest away before it touches a shard.
            check_not_rebuilt(self._folder, self.manifest, shard)
            self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._maps) > _MAX_OPEN_SHARDS:
            self._maps.popitem(last=False)  # unmapped when the last array that uses it is freed
        return self._maps[number]

    def _explain_token(self, tokens: np.ndarray, start: int) -> str:
        """Describe the first of `tokens`, which begin at `start`, that is not in the vocabulary."""
        place = int(np.argmax(tokens >= self.manifest.vocab_size))
        sample, offset = divmod(start + place, self.manifest.tokens_per_sample)
        shard = self._shards[sample // self.manifest.samples_per_shard]
        found = shard_digest(self._folder, shard)
        damage = f"checksum {found[:12]} instead of {shard.sha256[:12]}: the shard is damaged"
        if found == shard.sha256:
            damage = "its checksum is right, so it was made with another vocabulary"
        return (
            f"{self._folder / shard.file}: token {tokens[place]} at place {offset} of sample "
            f"{sample_key(self._name, self._split, sample)} is not in the vocabulary of {self.manifest.vocab_size}; "
            f"{damage}; remove it and run `biroute data build` to make it again"
        )


def check_not_rebuilt(folder: Path, manifest: Manifest, shard: ShardEntry) -> None:
    """Check that the dataset in `folder` still is the one that `manifest` describes.

    Raises:
        UsageError: it was built again, or is being built; the message names `shard`.
    """
    path, found = folder / MANIFEST_NAME, None
    try:
        stat = path.stat()
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if _found_right.get((path, manifest.checksum)) == state:
            return
        with open_regular(path) as file:
            found = parse_json(file.read()).get("checksum")
        if found == manifest.checksum:
            _found_right[path, manifest.checksum] = state
    except (OSError, ValueError, AttributeError):
        pass
    if found != manifest.checksum:
        what = "was built again" if found else "is being built again, or its manifest was removed"
        raise UsageError(
            f"{folder / shard.file}: data.dir={folder} {what} since this command began; a run must not read "
            "two datasets: build the new one in another folder"
        )


def open_shard(folder: Path, shard: ShardEntry) -> BufferedReader:
    """Open a shard's file after checking its size.

    Raises:
        UsageError: the file is missing, empty, truncated or of another size.
    """
    path = folder / shard.file
    remedy = "run `biroute data build` to make it again"
    try:
        file = open_regular(path)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UsageError(f"{path}: the shard {what}; {remedy}") from None
    size = os.fstat(file.fileno()).st_size
    if size != shard.size_bytes:
        file.close()
        what = "is empty" if size == 0 else "is truncated" if size < shard.size_bytes else "is an unknown file"
        raise UsageError(f"{path}: the shard {what}: {size} bytes instead of {shard.size_bytes}; {remedy}")
    return file


def shard_digest(folder: Path, shard: ShardEntry) -> str:
    """Return the SHA-256 of a shard's file, in hexadecimal; raises what `open_shard` raises."""
    with open_shard(folder, shard) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_header(file: BinaryIO, path: Path, first_key: str) -> None:
    """Check that a shard begins with the right sample.

    Raises:
        UsageError: it begins with another one.
    """
    expected = first_key + ".json"
    file.seek(0)
    found = file.read(_TAR_BLOCK)[:100].rstrip(b"\0").decode("utf-8", errors="replace")
    if found != expected:
        raise UsageError(
            f"{path}: an unknown shard: it begins with {found[:60]!r} instead of {expected!r}; remove it and run "
            "`biroute data build` to make it again"
        )
