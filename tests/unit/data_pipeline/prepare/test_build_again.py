"""Building a dataset again: what is kept, what is redone, and how a build that was cut off goes on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.corpora import chinese_texts, copy_of, data_config, english_texts, tree_bytes, write_jsonl

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare import build as build_module
from biroute.data_pipeline.prepare import encode, shard_writer, source_build
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.verify import verify_dataset
from biroute.data_pipeline.read.manifest import WORK_NAME, load_manifest

QUIET = Progress(quiet=True)


# A build in a process of its own, with parts small enough that many are made.
SCRIPT = """
import sys
from biroute.configs.errors import UsageError
from biroute.configs.data_section import DataConfig
from biroute.data_pipeline.prepare import build, source_build
if __name__ == "__main__":
    source_build.PART_BYTES = 8_000
    try:
        build.build_dataset(DataConfig.model_validate_json(sys.argv[1]))
    except UsageError as error:
        sys.exit(f"UsageError: {error}")
"""


def start_build(data: DataConfig, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, data.model_dump_json()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


# Nothing changed, something changed


def test_unchanged_build_does_nothing(built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy_of(built, tmp_path / "d", workers=2, seed=9)
    stamps = {path: path.stat().st_mtime_ns for path in data.dir.rglob("*.tar")}

    def no_reading(*_: Any) -> None:
        raise AssertionError("an unchanged build read a source")

    monkeypatch.setattr(build_module, "read_documents", no_reading)
    result = build_dataset(data, QUIET)
    assert result.rebuilt == ()
    assert result.seconds < 2
    assert result.manifest == load_manifest(built.dir)
    assert {path: path.stat().st_mtime_ns for path in data.dir.rglob("*.tar")} == stamps


def test_a_lost_shard_is_made_again(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    (data.dir / "chinese" / "train-000000.tar").unlink()
    assert build_dataset(data, QUIET).rebuilt == ("chinese",)
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_another_layout_keeps_the_tokenizer_and_leaves_no_stale_shard(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d", tokens_per_sample=5000)
    result = build_dataset(data, QUIET)
    assert result.rebuilt == ("english", "chinese")
    assert result.manifest.tokenizer_fingerprint == load_manifest(built.dir).tokenizer_fingerprint
    verify_dataset(data.dir, deep=True)
    assert not (data.dir / WORK_NAME).exists()


def test_with_a_given_tokenizer_only_the_changed_source_is_redone(built: DataConfig, tmp_path: Path) -> None:
    shutil.copy(built.dir / "tokenizer.model", tmp_path / "given.model")
    data = data_config(tmp_path, tokenizer={"model_path": tmp_path / "given.model", "vocab_size": 512})
    first = build_dataset(data, QUIET).manifest
    write_jsonl(tmp_path / "chinese.jsonl", chinese_texts(300))
    second = build_dataset(data, QUIET)
    assert second.rebuilt == ("chinese",)
    assert second.manifest.sources[0] == first.sources[0]
    assert second.manifest.sources[1].counts["documents"] == 300
    fewer = data.model_copy(update={"sources": data.sources[:1]})
    assert build_dataset(fewer, QUIET).rebuilt == ()
    assert not list((data.dir / "chinese").glob("*.tar"))
    verify_dataset(data.dir, deep=True)


def test_changed_text_trains_another_tokenizer(built: DataConfig, tmp_path: Path) -> None:
    data = data_config(tmp_path)
    build_dataset(data, QUIET)
    write_jsonl(tmp_path / "english.jsonl", english_texts(150))
    result = build_dataset(data, QUIET)
    assert result.rebuilt == ("english", "chinese")
    assert result.manifest.tokenizer_fingerprint != load_manifest(built.dir).tokenizer_fingerprint
    verify_dataset(data.dir, deep=True)


def stopping_after(number: int, written: list[str]) -> Callable[..., Any]:
    """A writer of shards that is interrupted after so many, whose names go to `written`."""
    write_shard = shard_writer.write_shard

    def write(folder: Path, file: str, *rest: Any) -> Any:
        if len(written) == number:
            raise KeyboardInterrupt
        written.append(file)
        return write_shard(folder, file, *rest)

    return write


def test_changing_back_in_mid_build_is_no_mixture(
    built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy_of(built, tmp_path / "d")
    written: list[str] = []
    write_shard = shard_writer.write_shard
    monkeypatch.setattr(shard_writer, "write_shard", stopping_after(3, written))
    # Other texts in shards of the same names and sizes.
    with pytest.raises(KeyboardInterrupt):
        build_dataset(data.model_copy(update={"min_document_bytes": 60}), QUIET)
    assert written[0] == "english/train-000000.tar"
    with pytest.raises(UsageError, match="is not finished; run `biroute data build`"):
        verify_dataset(data.dir)
    monkeypatch.setattr(shard_writer, "write_shard", write_shard)
    build_dataset(data, QUIET)
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


# Interruption


@pytest.mark.parametrize("seed", range(3))
def test_killed_builds_continue_to_the_same_bytes(built: DataConfig, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = built.model_copy(update={"dir": tmp_path / "d", "workers": 1 + seed % 2, "samples_per_shard": 2})
    whole = data.model_copy(update={"dir": tmp_path / "whole", "workers": 1})
    build_dataset(whole, QUIET)
    seen: set[str] = set()
    for _ in range(2):
        process = start_build(data)
        target = len(seen) + draw.randrange(1, 25)  # files that must have come before the kill
        while process.poll() is None and len(seen) < target:
            seen |= {f"{root}/{name}" for root, _, names in os.walk(data.dir) for name in names}
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlive a killed build"
    assert not (data.dir / "manifest.json").exists(), "killed too late to show anything"
    build_dataset(data, QUIET)
    assert tree_bytes(data.dir) == tree_bytes(whole.dir)
    verify_dataset(data.dir, deep=True)


def test_continuing_keeps_finished_parts_and_shards(
    built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_build, "PART_BYTES", 20_000)
    data = built.model_copy(update={"dir": tmp_path / "d"})
    encoded: list[str] = []
    encode_part, write_shard = encode._encode_part, shard_writer.write_shard

    def stop_after_five(path: Path, texts: encode.Texts) -> None:
        if len(encoded) == 5:
            raise KeyboardInterrupt
        encoded.append(path.name)
        encode_part(path, texts)

    monkeypatch.setattr(encode, "_encode_part", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(data, QUIET)
    monkeypatch.setattr(
        encode, "_encode_part", lambda path, texts: (encoded.append(path.name), encode_part(path, texts))
    )
    written: list[str] = []
    monkeypatch.setattr(shard_writer, "write_shard", stopping_after(2, written))
    with pytest.raises(KeyboardInterrupt):
        build_dataset(data, QUIET)
    assert len(encoded) > 5
    assert sorted(set(encoded)) == encoded  # each part once
    monkeypatch.setattr(shard_writer, "write_shard", lambda *args: (written.append(args[1]), write_shard(*args))[1])
    build_dataset(data, QUIET)
    assert len(written) == len(set(written)) == sum(1 for _ in load_manifest(data.dir).shards())
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_two_builds_at_once_are_refused(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    with build_module._lock(data.dir), pytest.raises(UsageError, match="another build is running"):
        build_dataset(data, QUIET)
    build_dataset(data, QUIET)


def test_killed_worker_is_one_clear_line(tmp_path: Path, built: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_build, "PART_BYTES", 8_000)
    submit = encode.PartEncoder.submit
    others = set(psutil.Process().children())  # of this test session, such as ranks waiting for jobs

    def kill_one(self: encode.PartEncoder, path: Path, texts: encode.Texts, mark: int) -> None:
        submit(self, path, texts, mark)
        if path.name.endswith("-000004.npz"):
            [child for child in psutil.Process().children() if child not in others][-1].kill()

    monkeypatch.setattr(encode.PartEncoder, "submit", kill_one)
    data = built.model_copy(update={"dir": tmp_path / "d", "workers": 3})
    with pytest.raises(UsageError, match=r"data\.workers=3: a tokenising process was killed"):
        build_dataset(data, QUIET)
    monkeypatch.setattr(encode.PartEncoder, "submit", submit)
    build_dataset(data, QUIET)
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_full_disk_is_one_clear_line_and_the_build_continues(built: DataConfig, tmp_path: Path) -> None:
    # The kernel's limit on file sizes stands in for a full disk: writing fails in the same places.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))\n" + SCRIPT
    data = built.model_copy(update={"dir": tmp_path / "d"})
    command = [sys.executable, "-c", limited, data.model_dump_json()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"UsageError: data.dir={data.dir}: the disk is full (File too large)"), run.stderr
    assert run.returncode == 1
    build_dataset(data, QUIET)
    assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_damaged_remains_of_a_build_are_made_again(built: DataConfig, tmp_path: Path) -> None:
    data = copy_of(built, tmp_path / "d")
    whole = tree_bytes(data.dir)
    first, second = load_manifest(data.dir).sources[:2]
    (data.dir / "manifest.json").unlink()
    parts = data.dir / WORK_NAME / f"{first.name}@{first.key}"
    parts.mkdir(parents=True)
    (parts / f"summary-{source_build.PART_BYTES}.json").write_text('{"parts": "all"}')
    (parts / "train-000000.json").write_text("[]")
    parts.with_name(f"{second.name}@{second.key}.json").write_text("{")
    (parts / f"part-{source_build.PART_BYTES}-000000.npz").write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(UsageError, match=r"part-.*damaged since it was written.*remove the folder .*@"):
        build_dataset(data, QUIET)
    shutil.rmtree(parts)
    build_dataset(data, QUIET)
    assert tree_bytes(data.dir) == whole
