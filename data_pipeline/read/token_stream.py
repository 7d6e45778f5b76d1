"""Random access to the tokens of a dataset through memory maps of its WebDataset shards."""

from __future__ import annotations

import io
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from biroute.configs.errors import UsageError
from biroute.data_pipeline.read.manifest import ShardEntry, SplitEntry

_TAR_BLOCK = 512
# Maps that one reader keeps open; Linux allows a process 65,530.
_MAX_OPEN_SHARDS = 512


def sample_key(source: str, split: str, index: int) -> str:
    """Return the WebDataset key of a sample. It has no dot, since webdataset reads what follows a dot as the type."""
    return f"{source}-{split}-{index:09d}"


class TokenStream:
    """Random access to the tokens of one split of a source, through memory maps of its shards."""

    def __init__(self, folder: Path, name: str, split: str, entry: SplitEntry, dtype: str, layout: tuple[int, int]):
        """Open a split.

        Args:
            folder: the dataset's folder.
            name: name of the source.
            split: "train" or "heldout".
            entry: the split's entry in the manifest.
            dtype: data type of the stored tokens.
            layout: tokens per sample and samples per shard, as in the manifest.
        """
        self._folder = folder
        self._name = name
        self._split = split
        self._shards = entry.shards
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokens_per_sample, self._samples_per_shard = layout
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.num_tokens = entry.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens start ... stop - 1 of the stream: [stop - start] int64.

        Raises:
            IndexError: the range is not inside the stream.
            UsageError: a shard was removed or replaced.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} ... {stop} of a stream of {self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            sample, offset = divmod(position, self._tokens_per_sample)
            count = min(stop - position, self._tokens_per_sample - offset)
            out[position - start : position - start + count] = self._read_sample(sample, offset, count)
            position += count
        return out

    def _read_sample(self, sample: int, offset: int, count: int) -> np.ndarray:
        number, index = divmod(sample, self._samples_per_shard)
        shard = self._shards[number]
        begin = shard.first_data_offset + index * shard.sample_stride + offset * self._dtype.itemsize
        return np.frombuffer(self._map(number), dtype=self._dtype, count=count, offset=begin)

    def _map(self, number: int) -> mmap.mmap:
        if number in self._maps:
            self._maps.move_to_end(number)
            return self._maps[number]
        shard = self._shards[number]
        with open_shard(self._folder, shard) as file:
            first = sample_key(self._name, self._split, number * self._samples_per_shard)
            check_header(file, self._folder / shard.file, first)
            self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._maps) > _MAX_OPEN_SHARDS:
            self._maps.popitem(last=False)  # unmapped when the last array that uses it is freed
        return self._maps[number]


def open_shard(folder: Path, shard: ShardEntry) -> io.BufferedReader:
    """Open a shard's file after checking its size.

    Raises:
        UsageError: the file is missing, empty, truncated or of another size.
    """
    path = folder / shard.file
    remedy = "run `biroute data build` to make it again"
    try:
        file = path.open("rb")
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UsageError(f"{path}: the shard {what}; {remedy}") from None
    size = os.fstat(file.fileno()).st_size
    if size != shard.size_bytes:
        file.close()
        what = "is empty" if size == 0 else "is truncated" if size < shard.size_bytes else "is an unknown file"
        raise UsageError(f"{path}: the shard {what}: {size} bytes instead of {shard.size_bytes}; {remedy}")
    return file


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
