"""Damaged datasets: seen before training, named in one line, repaired by another build."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.corpora import copy_of, tree_bytes

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.verify import verify_dataset
from biroute.data_pipeline.read.manifest import load_manifest

QUIET = Progress(quiet=True)


def truncate_at_header(path: Path) -> None:
    """Where webdataset notices nothing: between two samples."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[4].offset
    os.truncate(path, end)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_with_neighbour(path: Path) -> None:
    """Two shards of one size change places."""
    other = path.with_name("train-000000.tar")
    assert other.stat().st_size == path.stat().st_size
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def foreign_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, arcname="0000.py")


def edit_manifest(path: Path) -> None:
    manifest = path.parents[1] / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["sources"][0]["splits"]["train"]["shards"][1]["tokens"] += 1
    manifest.write_text(json.dumps(tree))


def forge(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the checksum that belongs to the change."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    del tree["checksum"]
    checksum = hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    path.write_text(json.dumps(tree | {"checksum": checksum}))


def other_tokenizer(path: Path) -> None:
    model = path.parents[1] / "tokenizer.model"
    content = model.read_bytes()
    at = content.rindex(b"\x18\x02")  # trainer_spec.model_type
    model.write_bytes(content[:at] + b"\x18\x01" + content[at + 2 :])


DAMAGE = {
    "missing": (lambda path: path.unlink(), r"train-000001\.tar: the shard is missing"),
    "empty": (lambda path: os.truncate(path, 0), r"train-000001\.tar: the shard is empty"),
    "truncated": (lambda path: os.truncate(path, 20_000), r"train-000001\.tar: the shard is truncated: 20000 bytes"),
    "truncated at a header": (truncate_at_header, r"train-000001\.tar: the shard is truncated"),
    "foreign": (foreign_tar, r"train-000001\.tar: the shard is (a foreign file|truncated)"),
    "swapped": (swap_with_neighbour, r"train-00000\d\.tar: an unknown shard: it begins with"),
    "unlisted": (lambda path: shutil.copy(path, path.with_name("extra.tar")), r"extra\.tar: an unknown shard"),
    "manifest cut": (
        lambda path: os.truncate(path.parents[1] / "manifest.json", 500),
        r"manifest\.json: damaged or of another version",
    ),
    "manifest edited": (edit_manifest, r"manifest\.json: damaged .*tokens of the shards do not add up"),
    "manifest missing": (lambda path: (path.parents[1] / "manifest.json").unlink(), "holds no dataset"),
    "tokenizer missing": (
        lambda path: (path.parents[1] / "tokenizer.model").unlink(),
        r"tokenizer\.model: the tokenizer is missing; run `biroute data build`",
    ),
    "tokenizer damaged": (
        lambda path: (path.parents[1] / "tokenizer.model").write_bytes(b"x"),
        r"tokenizer\.model: the tokenizer is damaged; put it back, or run `biroute data build` to make it again",
    ),
    "another tokenizer": (other_tokenizer, r"tokenizer\.model: fingerprint \w+, but the shards were made with"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_without_reading_everything_and_build_repairs_it(
    built: DataConfig, tmp_path: Path, kind: str
) -> None:
    data = copy_of(built, tmp_path / "d")
    damage, message = DAMAGE[kind]
    damage(data.dir / "english" / "train-000001.tar")
    with pytest.raises(UsageError, match=message) as error:
        verify_dataset(data.dir)
    assert "\n" not in str(error.value)
    if kind in (
        "swapped",
        "unlisted",
    ):  # sizes are right, or the manifest is: `build` trusts both, the message says more
        assert "remove it" in str(error.value)
        for path in data.dir.glob("english/*.tar"):
            path.unlink()
    build_dataset(data, QUIET)
    verify_dataset(data.dir, deep=True)
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_a_flipped_byte_is_seen_by_the_checksum(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    flip_byte(data.dir / "chinese" / "heldout-000000.tar")
    verify_dataset(data.dir)
    with pytest.raises(UsageError, match=r"chinese/heldout-000000\.tar: checksum \w+ instead of \w+.*remove it"):
        verify_dataset(data.dir, deep=True)
    (data.dir / "chinese" / "heldout-000000.tar").unlink()  # as the message says
    build_dataset(data, QUIET)
    verify_dataset(data.dir, deep=True)


def shard_of(tree: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = tree["sources"][0]["splits"]["train"]["shards"][1]
    return shard


def test_a_manifest_that_was_changed_by_hand_is_refused(built: DataConfig, tmp_path: Path) -> None:
    """One byte further on lies another token of the same vocabulary: only the checksum can tell."""
    data = copy_of(built, tmp_path / "d")
    path = data.dir / "manifest.json"
    tree = json.loads(path.read_text())
    shard_of(tree)["first_data_offset"] += 2
    path.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=r"manifest\.json: damaged, changed by hand"):
        load_manifest(data.dir)
    del tree["checksum"]
    path.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=r"manifest\.json: damaged, changed by hand"):
        load_manifest(data.dir)


def test_verify_reads_by_the_index_that_training_uses(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    forge(data.dir, lambda tree: shard_of(tree).update(first_data_offset=shard_of(tree)["first_data_offset"] - 2))
    verify_dataset(data.dir)
    with pytest.raises(UsageError, match=r"train-000001\.tar: (training would read other tokens|token \d+ at place)"):
        verify_dataset(data.dir, deep=True)


ABSURD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "offset": (lambda tree: shard_of(tree).update(first_data_offset=999_999_999), "lead outside of the file"),
    "stride": (lambda tree: shard_of(tree).update(sample_stride=10), "into the sample before"),
    "long stride": (lambda tree: shard_of(tree).update(sample_stride=1 << 60), "lead outside of the file"),
    "tokens per sample": (lambda tree: tree.update(tokens_per_sample=1), "do not fit samples_per_shard"),
    "one token less": (lambda tree: tree.update(tokens_per_sample=999), "do not fit samples_per_shard"),
    "samples per shard": (lambda tree: tree.update(samples_per_shard=10**12), "do not fit samples_per_shard"),
    "eos": (lambda tree: tree.update(eos_id=10**9), "does not fit dtype=uint16 and eos_id=1000000000"),
    "vocabulary": (lambda tree: tree.update(vocab_size=70_000), "vocab_size=70000 does not fit dtype=uint16"),
    "another shard": (
        lambda tree: shard_of(tree).update(file="english/train-000002.tar"),
        "train-000002.tar is listed as shard 1",
    ),
    "outside": (lambda tree: shard_of(tree).update(file="../train-000001.tar"), "should match pattern"),
    "negative": (lambda tree: shard_of(tree).update(first_data_offset=-1), "greater than 0"),
    "text": (lambda tree: tree.update(vocab_size="many"), "valid integer"),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_manifest_is_refused_whatever_its_checksum(built: DataConfig, tmp_path: Path, kind: str) -> None:
    data = copy_of(built, tmp_path / "d")
    edit, message = ABSURD[kind]
    forge(data.dir, edit)
    with pytest.raises(UsageError, match=r"manifest\.json: damaged .*" + re.escape(message)) as error:
        load_manifest(data.dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 200_000, b"\xff\xfe{}", b"null", b'{"format": 3}'])
def test_a_manifest_of_anything_is_refused_in_one_line(built: DataConfig, tmp_path: Path, content: bytes) -> None:
    data = copy_of(built, tmp_path / "d")
    (data.dir / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest\.json: damaged or of another version") as error:
        load_manifest(data.dir)
    assert "\n" not in str(error.value)


def test_counting_sees_what_a_forged_checksum_hides(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    path = data.dir / "english" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    manifest = load_manifest(data.dir)
    shard = manifest.sources[0].splits["train"].shards[1]
    content[shard.first_data_offset : shard.first_data_offset + 2] = b"\xff\xff"  # a token beyond the vocabulary
    path.write_bytes(content)
    forge(data.dir, lambda tree: shard_of(tree).update(sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UsageError, match="holds no tokens of this vocabulary"):
        verify_dataset(data.dir, deep=True)


@pytest.mark.parametrize("name", ["pipe:touch started;echo ", "a::pipe:touch started", "exp:1", "a{1..3}b", "file:x",
                                  "http:x", "x#y?z%41", "with space"])  # fmt: skip
def test_no_name_of_a_folder_is_more_than_a_name(
    built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """webdataset takes a path for a URL, and `pipe:` for a command."""
    monkeypatch.chdir(tmp_path)
    data = copy_of(built, Path(name) / "dataset")
    verify_dataset(data.dir, deep=True)
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]
