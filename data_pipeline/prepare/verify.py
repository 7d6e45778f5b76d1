"""`biroute data verify`: check that a dataset matches its manifest.

webdataset reads a damaged tar file without an error and yields fewer samples, so damage must be searched explicitly.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.tokenizer import Tokenizer, load_tokenizer
from biroute.data_pipeline.read.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    load_manifest,
)
from biroute.data_pipeline.read.token_stream import TokenStream, check_header, open_shard, sample_key, shard_digest

_REMEDY = "remove it and run `biroute data build` to make it again"


def verify_dataset(folder: Path, deep: bool = False, progress: Progress | None = None) -> Manifest:
    """Check the dataset in `folder` and return its manifest.

    The quick check requires that the manifest is intact, the tokenizer is the one that made the shards, every shard
    has the right size and first sample, and there are no other tar files. The deep check reads every byte: it
    compares the SHA-256 of each shard, then reads each sample with webdataset and counts tokens, documents and bytes.

    Args:
        folder: the dataset's folder.
        deep: perform the deep check as well.
        progress: shows the progress of the deep check; None for no output.

    Raises:
        UsageError: a check failed; the message names the file.
    """
    manifest, tokenizer = check_dataset(folder)
    if deep:
        _verify_deep(folder, manifest, tokenizer, progress or Progress(quiet=True))
    return manifest


def check_dataset(folder: Path, part: int = 0, parts: int = 1) -> tuple[Manifest, Tokenizer]:
    """Perform the quick check of `verify_dataset`, and return the manifest and the tokenizer.

    Args:
        folder: the dataset's folder.
        part, parts: which of the shards are opened, where several processes share them: each opens every `parts`-th.

    Raises:
        UsageError: a check failed; the message names the file.
    """
    manifest = load_manifest(folder)
    tokenizer = check_tokenizer(folder, manifest)
    for shard, first in list(_shards_with_first_key(manifest))[part::parts]:
        with open_shard(folder, shard) as file:
            check_header(file, folder / shard.file, first)
    if part == 0:
        _check_no_others(folder, manifest)
    return manifest, tokenizer


def _shards_with_first_key(manifest: Manifest) -> Iterator[tuple[ShardEntry, str]]:
    for source in manifest.sources:
        for split in SPLITS:
            for number, shard in enumerate(source.splits[split].shards):
                yield shard, sample_key(source.name, split, number * manifest.samples_per_shard)


def check_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Load the dataset's tokenizer and check that it is the one that made the shards.

    Raises:
        UsageError: the tokenizer is missing, damaged or another one.
    """
    if not (folder / TOKENIZER_NAME).exists():
        raise UsageError(
            f"{folder / TOKENIZER_NAME}: the tokenizer is missing; run `biroute data build` to make it again"
        )
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    except UsageError:  # its remedies are for a tokenizer that the configuration names
        raise UsageError(
            f"{folder / TOKENIZER_NAME}: the tokenizer is damaged; put it back, or run `biroute data build` to make "
            "it again"
        ) from None
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UsageError(
            f"{folder / TOKENIZER_NAME}: fingerprint {tokenizer.fingerprint[:12]}, but the shards were made with "
            f"{manifest.tokenizer_fingerprint[:12]}; put that tokenizer back or run `biroute data build`"
        )
    return tokenizer


def _check_no_others(folder: Path, manifest: Manifest) -> None:
    listed = {folder / shard.file for shard in manifest.shards()}
    found = set(folder.glob("*/*.tar")) | set(folder.glob("*.tar"))
    others = sorted(found - listed)
    if others:
        raise UsageError(f"{others[0]}: an unknown shard that {MANIFEST_NAME} does not list; remove it")


def _verify_deep(folder: Path, manifest: Manifest, tokenizer: Tokenizer, progress: Progress) -> None:
    token_bytes = tokenizer.token_bytes()
    done = 0
    with progress.stage("verifying shards", sum(shard.size_bytes for shard in manifest.shards())) as update:
        for source in manifest.sources:
            for split in SPLITS:
                begins, stream = True, TokenStream(folder, manifest, source, split)
                for number, shard in enumerate(source.splits[split].shards):
                    _check_digest(folder, shard)
                    first = sample_key(source.name, split, number * manifest.samples_per_shard)
                    begins = _check_samples(folder, shard, first, stream, token_bytes, begins)
                    done += shard.size_bytes
                    update(done)


def _check_digest(folder: Path, shard: ShardEntry) -> None:
    found = shard_digest(folder, shard)
    if found != shard.sha256:
        raise UsageError(
            f"{folder / shard.file}: checksum {found[:12]} instead of {shard.sha256[:12]}: the shard is damaged; "
            f"{_REMEDY}"
        )


def _samples(folder: Path, shard: ShardEntry) -> Iterator[dict[str, Any]]:
    """Yield what webdataset reads from a shard, undecoded, as decoding would unpickle content of an untrusted shard.

    webdataset gets the open file: it would take a path for a URL, and a URL can be a command that it runs.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open_shard(folder, shard) as file:
        yield from group_by_keys(tar_file_expander([{"url": shard.file, "stream": file}]))


def _check_samples(
    folder: Path, shard: ShardEntry, first_key: str, stream: TokenStream, token_bytes: np.ndarray, begins: bool
) -> bool:
    """Check what webdataset reads from a shard, and that training reads the same from `stream`.

    `begins` tells whether the shard starts with a new document, and the result tells whether the next one does.
    """
    path, manifest = folder / shard.file, stream.manifest
    prefix, _, digits = first_key.rpartition("-")
    samples = tokens = documents = text_bytes = 0
    for sample in _samples(folder, shard):
        expected = f"{prefix}-{int(digits) + samples:09d}"
        if sample["__key__"] != expected:
            raise UsageError(f"{path}: sample {sample['__key__'][:60]!r} where {expected!r} belongs; {_REMEDY}")
        array = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        if array.dtype != np.dtype(manifest.dtype) or (array >= manifest.vocab_size).any():
            raise UsageError(f"{path}: sample {expected!r} holds no tokens of this vocabulary; {_REMEDY}")
        ends = array == manifest.eos_id
        in_sample = int(begins) + int(ends[:-1].sum())
        if json.loads(sample["json"])["documents"] != in_sample:
            raise UsageError(f"{path}: sample {expected!r} does not hold as many documents as it claims; {_REMEDY}")
        begins = bool(ends[-1])
        start = (int(digits) + samples) * manifest.tokens_per_sample
        if not np.array_equal(stream.read(start, start + len(array)), array):
            raise UsageError(
                f"{path}: training would read other tokens than sample {expected!r} holds: first_data_offset="
                f"{shard.first_data_offset} or sample_stride={shard.sample_stride} in {MANIFEST_NAME} is wrong; "
                f"{_REMEDY}"
            )
        samples += 1
        tokens += len(array)
        documents += in_sample
        text_bytes += int(token_bytes[array].sum())
    counted = {"samples": samples, "tokens": tokens, "documents": documents, "text_bytes": text_bytes}
    for field, found in counted.items():
        if found != getattr(shard, field):
            raise UsageError(f"{path}: {found} {field} instead of {getattr(shard, field)}; {_REMEDY}")
    return begins
