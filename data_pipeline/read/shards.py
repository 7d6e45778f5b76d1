"""WebDataset shards: plain tar files that `webdataset` reads, and that are read here at random through memory maps.

A source's split is one long stream of tokens. A sample is `tokens_per_sample` tokens of it (the last one fewer),
stored as two members of the tar: `<source>-<split>-<index>.json` and `.npy`.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from biroute.configs.errors import UserError
from biroute.data_pipeline.read.manifest import ShardEntry, SplitEntry

_TAR_BLOCK = 512
# Maps kept open by one reader; the kernel allows 65,530 in a process.
_MAX_OPEN_SHARDS = 512


def shard_name(source: str, split: str, index: int) -> str:
    """File of a shard, relative to the dataset's folder."""
    return f"{source}/{split}-{index:06d}.tar"


def sample_key(source: str, split: str, index: int) -> str:
    """WebDataset key of a sample. No dot: webdataset takes what follows the first one for the kind of member."""
    return f"{source}-{split}-{index:09d}"


def npy_header(dtype: str, tokens: int) -> bytes:
    """What precedes the tokens in a `.npy` member."""
    stream = io.BytesIO()
    description = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def write_shard(folder: Path, file: str, samples: list[dict[str, Any]], token_bytes: np.ndarray) -> ShardEntry:
    """Write one shard through webdataset's writer, atomically; the same samples give the same bytes.

    Args:
        folder: the dataset's folder.
        file: the shard's name in it.
        samples: each with `key`, `tokens` (array of the final dtype) and `meta` (source, index, documents).
        token_bytes: [vocab] UTF-8 bytes of each token.

    Raises:
        OSError: the disk is full, say; the shard is then not there.
    """
    from webdataset.writer import TarWriter

    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as raw:
        stream = _HashingFile(raw)
        # mtime=0: otherwise the clock is a part of the file.
        with TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(
                    {
                        "__key__": sample["key"],
                        "json": json.dumps(sample["meta"], sort_keys=True).encode(),
                        "npy": npy_header(sample["tokens"].dtype.name, len(sample["tokens"]))
                        + _raw(sample["tokens"]),
                    }
                )
        raw.flush()
        os.fsync(raw.fileno())
    first_offset, stride = _index_of(temporary)
    entry = ShardEntry(
        file=file,
        size_bytes=stream.size_bytes,
        sha256=stream.digest.hexdigest(),
        samples=len(samples),
        tokens=sum(len(sample["tokens"]) for sample in samples),
        documents=sum(sample["meta"]["documents"] for sample in samples),
        text_bytes=sum(int(token_bytes[sample["tokens"]].sum()) for sample in samples),
        first_data_offset=first_offset,
        sample_stride=stride,
    )
    temporary.replace(path)
    return entry


def write_stream(
    folder: Path,
    name: str,
    split: str,
    parts: Iterable[np.ndarray],
    layout: tuple[int, int],
    eos_id: int,
    token_bytes: np.ndarray,
    done: Callable[[int], ShardEntry | None],
    on_shard: Callable[[int, ShardEntry], None],
) -> SplitEntry:
    """Write the stream that `parts` make up as shards.

    Args:
        parts: arrays of tokens of the final dtype, in order; whole documents, each ended by `eos_id`.
        layout: tokens per sample, samples per shard.
        done: entry of shard i if it was finished before, else None.
        on_shard: called with each shard as it is finished, also with those that were before.
    """
    tokens_per_sample, samples_per_shard = layout
    entries: list[ShardEntry] = []
    samples: list[dict[str, Any]] = []
    begins = True  # the next token begins a document

    def flush() -> None:
        number = len(entries)
        entry = done(number) or write_shard(folder, shard_name(name, split, number), samples, token_bytes)
        on_shard(number, entry)
        entries.append(entry)
        samples.clear()

    for index, tokens in enumerate(_cut(parts, tokens_per_sample)):
        ends = tokens == eos_id
        meta = {"source": name, "index": index, "documents": int(begins) + int(ends[:-1].sum())}
        begins = bool(ends[-1])
        samples.append({"key": sample_key(name, split, index), "tokens": tokens, "meta": meta})
        if len(samples) == samples_per_shard:
            flush()
    if samples:
        flush()
    totals = {field: sum(getattr(e, field) for e in entries) for field in ("documents", "tokens", "text_bytes")}
    return SplitEntry(shards=tuple(entries), **totals)


def _cut(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The concatenation of `parts` in pieces of `size`, the last one shorter."""
    waiting: list[np.ndarray] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length < size:
            continue
        joined = np.concatenate(waiting)
        whole = length - length % size
        for start in range(0, whole, size):
            yield joined[start : start + size]
        waiting, length = [joined[whole:]], length - whole
    if length:
        yield np.concatenate(waiting)


def _raw(tokens: np.ndarray) -> bytes:
    return tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()


def _index_of(path: Path) -> tuple[int, int]:
    """Offset of the first sample's tokens and the distance between samples, from the tar's headers."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".npy")]
    with path.open("rb") as file:
        offsets = [member.offset_data + _header_bytes(file, member.offset_data) for member in members]
    stride = offsets[1] - offsets[0] if len(offsets) > 1 else path.stat().st_size
    if offsets != [offsets[0] + i * stride for i in range(len(offsets))]:
        raise RuntimeError(f"{path}: samples are not evenly spaced")  # a member of unequal size slipped in
    return offsets[0], stride


def _header_bytes(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell() - offset


class _HashingFile:
    """A file to write to that keeps the SHA-256 and the number of what was written."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        return self._raw.write(data)


class TokenStream:
    """Random access to the tokens of one source's split, through memory maps of its shards."""

    def __init__(self, folder: Path, name: str, split: str, entry: SplitEntry, dtype: str, layout: tuple[int, int]):
        """`layout`: tokens per sample, samples per shard, as in the manifest."""
        self._folder = folder
        self._name = name
        self._split = split
        self._shards = entry.shards
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokens_per_sample, self._samples_per_shard = layout
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.num_tokens = entry.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1 of the stream, [stop - start] int64.

        Raises:
            IndexError: out of the stream.
            UserError: a shard is gone or was replaced.
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
            self._maps.popitem(last=False)  # unmapped once the last array on it is gone
        return self._maps[number]


def open_shard(folder: Path, shard: ShardEntry) -> io.BufferedReader:
    """The shard's file, of the right size.

    Raises:
        UserError: missing, empty, truncated or of another size.
    """
    path = folder / shard.file
    remedy = "run `biroute data build` to make it again"
    try:
        file = path.open("rb")
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: the shard {what}; {remedy}") from None
    size = os.fstat(file.fileno()).st_size
    if size != shard.size_bytes:
        file.close()
        what = "is empty" if size == 0 else "is truncated" if size < shard.size_bytes else "is a foreign file"
        raise UserError(f"{path}: the shard {what}: {size} bytes instead of {shard.size_bytes}; {remedy}")
    return file


def check_header(file: BinaryIO, path: Path, first_key: str) -> None:
    """Does the shard begin with the sample that it should?

    Raises:
        UserError: it does not: a foreign shard.
    """
    expected = first_key + ".json"
    file.seek(0)
    found = file.read(_TAR_BLOCK)[:100].rstrip(b"\0").decode("utf-8", errors="replace")
    if found != expected:
        raise UserError(
            f"{path}: a foreign shard: it begins with {found[:60]!r} instead of {expected!r}; remove it and run "
            "`biroute data build` to make it again"
        )
