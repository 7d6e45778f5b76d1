"""Write WebDataset shards: plain tar files that `webdataset` can read and that training reads at random offsets.

Each split of a source is one long stream of tokens. A sample is `tokens_per_sample` consecutive tokens of it (the
last one may be shorter), stored as two members of the tar file: `<source>-<split>-<index>.json` and `.npy`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from biroute.configs.files import HashingWriter, atomic_draft
from biroute.data_pipeline.read.manifest import ShardEntry, SplitEntry
from biroute.data_pipeline.read.token_stream import sample_key


def shard_name(source: str, split: str, index: int) -> str:
    """Return the file name of a shard, relative to the dataset's folder."""
    return f"{source}/{split}-{index:06d}.tar"


def npy_header(dtype: str, tokens: int) -> bytes:
    """Return the header that precedes the tokens in a `.npy` member."""
    stream = io.BytesIO()
    description = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def write_shard(folder: Path, file: str, samples: list[dict[str, Any]], token_bytes: np.ndarray) -> ShardEntry:
    """Write one shard atomically with webdataset's writer; equal samples give equal bytes.

    Args:
        folder: the dataset's folder.
        file: the shard's name in it.
        samples: each with `key`, `tokens` (array of the final dtype) and `meta` (source, index, documents).
        token_bytes: [vocab] UTF-8 bytes of each token.

    Raises:
        OSError: the shard could not be written, for example because the disk is full; it then does not exist.
    """
    from webdataset.writer import TarWriter

    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_draft(path) as draft:
        stream = HashingWriter(draft)
        # mtime=0, since the file would otherwise contain the current time.
        with TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                tokens = sample["tokens"]
                writer.write(
                    {
                        "__key__": sample["key"],
                        "json": json.dumps(sample["meta"], sort_keys=True).encode(),
                        "npy": npy_header(tokens.dtype.name, len(tokens)) + _raw(tokens),
                    }
                )
        first_offset, stride = _index_of(draft, path)
    return ShardEntry(
        file=file,
        size_bytes=stream.size_bytes,
        sha256=stream.sha256,
        samples=len(samples),
        tokens=sum(len(sample["tokens"]) for sample in samples),
        documents=sum(sample["meta"]["documents"] for sample in samples),
        text_bytes=sum(int(token_bytes[sample["tokens"]].sum()) for sample in samples),
        first_data_offset=first_offset,
        sample_stride=stride,
    )


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
    """Write a stream of tokens as shards.

    Args:
        folder: the dataset's folder.
        name: name of the source.
        split: "train" or "heldout".
        parts: consecutive arrays of tokens of the final dtype: whole documents, each ended by `eos_id`.
        layout: tokens per sample and samples per shard.
        eos_id: the token that ends each document.
        token_bytes: [vocab] UTF-8 bytes of each token.
        done: returns the entry of shard i if an earlier build finished it, else None.
        on_shard: called with each finished shard, including those of an earlier build.
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
    """Yield the concatenation of `parts` in pieces of `size`; the last one may be shorter."""
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


def _index_of(file: BinaryIO, path: Path) -> tuple[int, int]:
    """Return the offset of the first sample's tokens and the distance between samples, from the tar headers."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        members = [member for member in tar if member.name.endswith(".npy")]
    offsets = [member.offset_data + _header_bytes(file, member.offset_data) for member in members]
    stride = offsets[1] - offsets[0] if len(offsets) > 1 else size
    if offsets != [offsets[0] + i * stride for i in range(len(offsets))]:
        raise RuntimeError(f"{path}: samples are not evenly spaced")  # some members differ in size
    return offsets[0], stride


def _header_bytes(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell() - offset
