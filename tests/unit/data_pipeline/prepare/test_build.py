"""Building datasets: what webdataset reads back, what the manifest says, and what is refused."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers.corpora import data_config, tree_bytes

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare import shard_writer, source_build
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.sources import SourceCounts, read_documents
from biroute.data_pipeline.prepare.tokenizer import Tokenizer, load_tokenizer
from biroute.data_pipeline.prepare.verify import verify_dataset
from biroute.data_pipeline.read.manifest import Manifest, SourceEntry, SplitEntry, load_manifest, to_json
from biroute.data_pipeline.read.token_stream import TokenStream

QUIET = Progress(quiet=True)


def expected_streams(data: DataConfig, tokenizer: Tokenizer) -> dict[tuple[str, str], list[int]]:
    """What the shards must hold, the slow and obvious way."""
    streams: dict[tuple[str, str], list[int]] = {}
    for source in data.sources:
        for document in read_documents(source, data, SourceCounts()):
            key = (source.name, "heldout" if document.heldout else "train")
            streams.setdefault(key, []).extend([*tokenizer.encode(document.text), tokenizer.eos_id])
    return streams


def stream_of(data: DataConfig, manifest: Manifest, name: str, split: Any) -> TokenStream:
    return TokenStream(data.dir, manifest, next(entry for entry in manifest.sources if entry.name == name), split)


def test_webdataset_and_the_memory_map_read_exactly_the_documents(built: DataConfig) -> None:
    manifest = load_manifest(built.dir)
    tokenizer = load_tokenizer(built.dir / "tokenizer.model", 512)
    token_bytes = tokenizer.token_bytes()
    for (name, split), expected in expected_streams(built, tokenizer).items():
        entry = next(source for source in manifest.sources if source.name == name).splits[split]
        files = [str(built.dir / shard.file) for shard in entry.shards]
        samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
        assert [sample["json"]["index"] for sample in samples] == list(range(len(samples)))
        assert {sample["json"]["source"] for sample in samples} == {name}
        assert all(len(sample["npy"]) == 1000 for sample in samples[:-1])
        assert all(sample["npy"].dtype == np.uint16 for sample in samples)
        assert np.concatenate([sample["npy"] for sample in samples]).tolist() == expected
        documents = expected.count(tokenizer.eos_id)
        assert sum(sample["json"]["documents"] for sample in samples) == documents == entry.documents
        assert (entry.tokens, entry.text_bytes) == (len(expected), int(token_bytes[expected].sum()))
        stream = stream_of(built, manifest, name, split)
        assert stream.read(0, stream.num_tokens).tolist() == expected
        draw = random.Random(2)
        for _ in range(50):
            begin, end = sorted(draw.choices(range(len(expected) + 1), k=2))
            assert stream.read(begin, end).tolist() == expected[begin:end]
        with pytest.raises(IndexError):
            stream.read(0, stream.num_tokens + 1)
    assert len(load_manifest(built.dir).sources[0].splits["train"].shards) > 2


def test_shards_are_plain_tars_without_clock_or_dots(built: DataConfig) -> None:
    with tarfile.open(built.dir / "english" / "train-000001.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["english-train-000000016.json", "english-train-000000016.npy"]
    assert {member.mtime for member in members} == {0}


def test_bytes_do_not_depend_on_workers_or_parts(
    built: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_build, "PART_BYTES", 30_000)
    for workers in (1, 3):
        data = built.model_copy(update={"dir": tmp_path / str(workers), "workers": workers})
        build_dataset(data, QUIET)
        assert tree_bytes(data.dir) == tree_bytes(built.dir)


def test_wide_vocabularies_take_four_bytes() -> None:
    assert source_build.token_dtype(1 << 16) == "uint16"
    assert source_build.token_dtype((1 << 16) + 1) == "uint32"


def test_four_byte_shards_read_back(tmp_path: Path) -> None:
    tokens = np.arange(70_000, 70_257, dtype=np.uint32)
    token_bytes = np.ones(80_000, dtype=np.int64)
    entry = shard_writer.write_stream(
        tmp_path,
        "s",
        "train",
        [tokens[:100], tokens[100:]],
        (64, 2),
        70_256,
        token_bytes,
        lambda n: None,
        lambda n, e: None,
    )
    empty = SplitEntry(documents=0, tokens=0, text_bytes=0, shards=())
    source = SourceEntry(name="s", key="", counts={}, splits={"train": entry, "heldout": empty})
    manifest = Manifest(
        tokenizer_fingerprint="", tokenizer_key="", vocab_size=80_000, eos_id=70_256, dtype="uint32",
        tokens_per_sample=64, samples_per_shard=2, settings={}, sources=(source,),
    ).sealed()  # fmt: skip
    (tmp_path / "manifest.json").write_bytes(to_json(manifest))
    stream = TokenStream(tmp_path, manifest, source, "train")
    assert stream.read(0, 257).tolist() == tokens.tolist()
    assert (len(entry.shards), entry.documents, entry.text_bytes) == (3, 1, 257)


def test_weights_share_out_the_tokenizers_sample(tmp_path: Path) -> None:
    def pieces(english: float, chinese: float) -> int:
        data = data_config(tmp_path, dir=tmp_path / f"{english}")
        weighted = [
            source.model_copy(update={"weight": weight})
            for source, weight in zip(data.sources, (english, chinese), strict=True)
        ]
        tokenizer = data.tokenizer.model_copy(update={"training_bytes": 40_000})
        data = data.model_copy(update={"sources": tuple(weighted), "tokenizer": tokenizer})
        build_dataset(data, QUIET)
        return len(load_tokenizer(data.dir / "tokenizer.model").encode("床前明月光，疑是地上霜。"))

    assert pieces(1.0, 9.0) < pieces(99.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_fraction": 1e-9}, r"heldout_fraction=1e-09 leaves no document for the held-out split; set it to"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction=1.0 leaves no document to train on; set it to"),
        ({"sources": []}, "data.sources is empty"),
        ({"sources": [{"name": "x", "paths": ["no-such/*.txt"]}]}, r"data.sources\[x\].paths: 'no-such/\*.txt'"),
        ({"tokenizer": {"vocab_size": 100_000}}, r"vocab_size=100000: the text yields only"),
        ({"tokenizer": {"model_path": "no-such.model"}}, r"no-such\.model: the tokenizer cannot be read"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        build_dataset(data_config(tmp_path, **changes), QUIET)
    assert "\n" not in str(error.value)


def test_given_model_of_another_size(built: DataConfig, tmp_path: Path) -> None:
    given = {"model_path": built.dir / "tokenizer.model", "vocab_size": 4096}
    with pytest.raises(UsageError, match=r"vocab_size=4096, but .* has 512 pieces; set .*vocab_size=512"):
        build_dataset(data_config(tmp_path, tokenizer=given), QUIET)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"data.dir=.*file/dataset: cannot write"):
        build_dataset(data_config(tmp_path, dir=tmp_path / "file" / "dataset"), QUIET)


def test_dirt_is_reported_in_the_manifest(tmp_path: Path) -> None:
    data = data_config(tmp_path)
    with (tmp_path / "chinese.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff\xfe bad"}\n{"text": ""}\nnonsense\n')
    counts = build_dataset(data, QUIET).manifest.sources[1].counts
    found = {name: counts[name] for name in ("invalid_utf8_documents", "empty_documents", "malformed_lines")}
    assert found == {"invalid_utf8_documents": 1, "empty_documents": 1, "malformed_lines": 1}


def test_progress_prints_plain_lines(capfd: pytest.CaptureFixture[str], built: DataConfig, tmp_path: Path) -> None:
    build_dataset(built.model_copy(update={"dir": tmp_path / "d"}))
    err = capfd.readouterr().err
    assert "tokenising english: " in err
    assert "MB/s" in err
    assert "\x1b" not in err


def test_no_name_of_a_source_gets_in_the_way(tmp_path: Path) -> None:
    data = data_config(tmp_path)
    names = ("work", "manifest")
    sources = [source.model_copy(update={"name": name}) for name, source in zip(names, data.sources, strict=True)]
    data = data.model_copy(update={"sources": tuple(sources)})
    assert build_dataset(data, QUIET).rebuilt == names
    assert build_dataset(data, QUIET).rebuilt == ()
    verify_dataset(data.dir, deep=True)
