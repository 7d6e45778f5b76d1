"""Readers and loaders: windows, objectives, elastic resume, prefetching, opening."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.corpora import run_config, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.dataset import Dataset, open_dataset
from biroute.data_pipeline.read.loader import (
    Batch,
    MicrobatchLoader,
    Objective,
    SequenceReader,
    make_batch,
)
from biroute.data_pipeline.read.manifest import Split, load_manifest, to_json

S = 64


CAUSAL = Objective("causal", np.zeros(512, dtype=np.int64))


def open_reader(folder: Path, split: Split, **options: Any) -> SequenceReader:
    return SequenceReader(folder, load_manifest(folder), split, **options)


def rows(batches: list[Batch]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch.inputs]


# Sequences


@pytest.mark.parametrize("length", [64, 37, 1000, 1500])  # windows inside samples, across samples, across shards
def test_an_epoch_is_every_window_of_every_source_once(dataset: Dataset, length: int) -> None:
    reader = SequenceReader(
        dataset.config.data.dir, load_manifest(dataset.config.data.dir), "train", sequence_length=length, seed=3
    )
    windows = [
        tokens[i * length : i * length + length + 1].tobytes()
        for tokens in (tokens_of(dataset, 0, "train"), tokens_of(dataset, 1, "train"))
        for i in range((len(tokens) - 1) // length)
    ]
    found = reader.sequences(np.arange(reader.num_sequences))
    assert found.dtype == np.int64
    assert found.shape == (len(windows), length + 1)
    assert Counter(row.tobytes() for row in found) == Counter(windows)
    np.testing.assert_array_equal(reader.sequence(5), found[5])


def test_weights_mix_the_sources(built: DataConfig) -> None:
    weights = {"english": 0.25, "chinese": 0.75}
    reader = open_reader(built.dir, "train", sequence_length=S, seed=0, weights=weights)
    assert reader.shares == pytest.approx(weights, abs=1e-3)
    weighted = [source.model_copy(update={"weight": weights[source.name]}) for source in built.sources]
    # Weights are no part of the dataset: nothing to build again.
    opened = open_dataset(run_config(built.model_copy(update={"sources": tuple(weighted)}), S))
    np.testing.assert_array_equal(opened.reader("train").sequence(7), reader.sequence(7))
    unweighted = open_reader(built.dir, "heldout", sequence_length=S, seed=0)
    np.testing.assert_array_equal(opened.reader("heldout").sequence(7), unweighted.sequence(7))


def test_too_few_tokens_for_a_sequence(built: DataConfig) -> None:
    with pytest.raises(UsageError, match=r"model.sequence_length=500000: the train split .* fewer than"):
        open_reader(built.dir, "train", sequence_length=500_000, seed=0)
    length = 6000
    open_reader(built.dir, "train", sequence_length=length, seed=0)
    with pytest.raises(UsageError, match=r"the heldout split of source chinese .* raise data.heldout_fraction"):
        SequenceReader(
            built.dir,
            load_manifest(built.dir),
            "heldout",
            sequence_length=length,
            seed=0,
            weights={"english": 1, "chinese": 1},
        )
    with pytest.raises(UsageError, match="weights for french"):
        open_reader(built.dir, "train", sequence_length=S, seed=0, weights={"french": 1.0})


def test_a_source_that_is_too_short_for_one_sequence_is_named(built: DataConfig) -> None:
    manifest = load_manifest(built.dir)
    chinese = manifest.sources[1]
    tokens = chinese.splits["heldout"].tokens
    assert manifest.left_out(tokens - 1) == []
    expected = f"source chinese is left out of evaluation: its {tokens:,} tokens of {manifest.tokens('heldout'):,}"
    (warning,) = manifest.left_out(tokens)
    assert expected in warning
    assert "chinese" not in open_reader(built.dir, "heldout", sequence_length=tokens, seed=0).shares


# Objectives


def test_causal_batches(dataset: Dataset) -> None:
    reader, objective = dataset.reader("train"), dataset.objective("train")
    batch = make_batch(reader, np.arange(4, 9), objective)
    for row, n in enumerate(range(4, 9)):
        tokens = reader.sequence(n)
        np.testing.assert_array_equal(batch.inputs[row], tokens[:-1])
        np.testing.assert_array_equal(batch.labels[row], tokens[1:])
    assert batch.target_bytes == sum(len(dataset.tokenizer.decode_bytes(row)) for row in batch.labels.tolist())
    assert batch.target_tokens == 5 * S


def test_target_bytes_of_an_epoch_are_the_bytes_of_the_text(dataset: Dataset) -> None:
    reader, objective = dataset.reader("train"), dataset.objective("train")
    total = sum(make_batch(reader, np.array([n]), objective).target_bytes for n in range(reader.num_sequences))
    expected = 0
    for source in (0, 1):
        tokens = tokens_of(dataset, source, "train")
        expected += len(dataset.tokenizer.decode_bytes(tokens[1 : (len(tokens) - 1) // S * S + 1].tolist()))
    assert total == expected


def test_masked_batches_hide_a_fixed_number_of_tokens(built: DataConfig) -> None:
    opened = open_dataset(run_config(built, S, model={"objective": "mlm", "mask_fraction": 0.25}))
    reader, objective = opened.reader("train"), opened.objective("train")
    batch = make_batch(reader, np.arange(20), objective)
    tokens = reader.sequences(np.arange(20))[:, :-1]
    hidden = batch.loss_mask
    assert hidden is not None
    assert (hidden.sum(axis=1) == S // 4).all()
    assert (batch.inputs[hidden] == opened.tokenizer.mask_id).all()
    np.testing.assert_array_equal(batch.inputs[~hidden], tokens[~hidden])
    np.testing.assert_array_equal(batch.labels, tokens)
    assert batch.target_tokens == hidden.sum()
    assert batch.target_bytes == int(opened.token_bytes[tokens[hidden]].sum())
    assert len({row.tobytes() for row in hidden}) == 20  # each sequence has its own mask
    again = make_batch(reader, np.arange(20), objective)
    np.testing.assert_array_equal(again.inputs, batch.inputs)
    model, train = {"objective": "mlm", "mask_fraction": 0.25}, {"seed": 1}
    other_seed = open_dataset(run_config(built, S, model=model, train=train)).objective("train")
    assert (make_batch(reader, np.arange(20), other_seed).inputs != batch.inputs).any()
    next_epoch = make_batch(reader, np.arange(reader.num_sequences), objective).labels
    assert next_epoch.shape == (reader.num_sequences, S)


# The loader


def loaders(dataset: Dataset, data_size: int, position: int, microbatch_size: int) -> list[MicrobatchLoader]:
    return [
        MicrobatchLoader(
            dataset.reader("train"),
            objective=CAUSAL,
            global_batch_size=12,
            microbatch_size=microbatch_size,
            data_rank=rank,
            data_size=data_size,
            position=position,
        )
        for rank in range(data_size)
    ]


@settings(max_examples=12)
@given(
    sizes=st.lists(st.sampled_from([(1, 2), (1, 4), (2, 3), (3, 1), (3, 2), (4, 1), (4, 3)]), min_size=4, max_size=6)
)
def test_elastic_runs_see_every_sequence_once(dataset: Dataset, sizes: list[tuple[int, int]]) -> None:
    reader = dataset.reader("train")
    epoch = reader.num_sequences // 12 * 12
    stretch = epoch // 12 // len(sizes)
    seen: list[bytes] = []
    position = 0
    for n, (data_size, microbatch_size) in enumerate(sizes):
        steps = stretch if n < len(sizes) - 1 else epoch // 12 - stretch * n
        ranks = loaders(dataset, data_size, position, microbatch_size)
        for _ in range(steps):
            for loader in ranks:
                batches = loader.step()
                assert len(batches) == loader.microbatches_per_step == 12 // (data_size * microbatch_size)
                seen += rows(batches)
        assert {loader.position for loader in ranks} == {position + 12 * steps}
        position = ranks[0].position
        for loader in ranks:
            loader.close()
    assert Counter(seen) == Counter(row.tobytes() for row in reader.sequences(np.arange(epoch))[:, :-1])


def test_one_rank_sees_the_same_steps_as_many(dataset: Dataset) -> None:
    def steps(data_size: int) -> list[set[bytes]]:
        ranks = loaders(dataset, data_size, 24, 1)
        found = [{row for loader in ranks for row in rows(loader.step())} for _ in range(5)]
        for loader in ranks:
            loader.close()
        return found

    assert steps(1) == steps(2) == steps(3) == steps(4)


def test_loader_waits_when_it_must_and_closes_cleanly(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    with dataset.train_loader(data_rank=0, data_size=1) as loader:
        assert threading.active_count() == before + 1
        loader.step()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.step()
    loader.close()
    sequences = SequenceReader.sequences

    def slow(self: SequenceReader, positions: np.ndarray) -> np.ndarray:
        time.sleep(0.005)
        return sequences(self, positions)

    monkeypatch.setattr(SequenceReader, "sequences", slow)
    with dataset.train_loader(data_rank=0, data_size=1) as loader:
        loader.step()
        assert loader.wait_seconds > 0.03  # 12 microbatches of 5 ms


def test_errors_of_the_thread_reach_the_consumer(built: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(built.dir, tmp_path / "d")
    opened = open_dataset(run_config(built.model_copy(update={"dir": tmp_path / "d"}), S))
    shard = next(opened.manifest.shards()).file
    (tmp_path / "d" / shard).unlink()
    before = threading.active_count()
    with opened.train_loader(data_rank=0, data_size=1) as loader:
        for _ in range(2):  # and stays an error
            with pytest.raises(UsageError, match=f"{shard}: the shard is missing"):
                list(itertools.starmap(loader.step, itertools.repeat((), 50)))
    assert threading.active_count() == before


def test_a_token_outside_of_the_vocabulary_names_its_shard(built: DataConfig, tmp_path: Path) -> None:
    """The size and the first sample of the shard are right, so nothing notices before training reads it."""
    shutil.copytree(built.dir, tmp_path / "d")
    opened = open_dataset(run_config(built.model_copy(update={"dir": tmp_path / "d"}), S))
    shard = next(opened.manifest.shards())
    with (tmp_path / "d" / shard.file).open("r+b") as file:
        file.seek(shard.first_data_offset + 6)
        file.write(b"\xff\x7f")
    expected = (
        rf"{shard.file}: token 32767 at place 3 of sample \S+-train-000000000 is not in the vocabulary of 512; "
        rf"checksum [0-9a-f]{{12}} instead of {shard.sha256[:12]}: the shard is damaged; remove it and run"
    )
    reader = opened.reader("train")
    with pytest.raises(UsageError, match=expected):
        reader.sequences(np.arange(20 * reader.num_sequences))


def test_a_shard_that_is_cut_short_while_it_is_read_is_named(built: DataConfig, tmp_path: Path) -> None:
    """Reading beyond the end of a mapped file would end the process with SIGBUS, without a word."""
    shutil.copytree(built.dir, tmp_path / "d")
    opened = open_dataset(run_config(built.model_copy(update={"dir": tmp_path / "d"}), S))
    reader = opened.reader("train")
    everything = np.arange(reader.num_sequences)
    reader.sequences(everything)
    shard = next(opened.manifest.shards())
    with (tmp_path / "d" / shard.file).open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(UsageError, match=rf"{shard.file}: the shard is truncated: 4096 bytes instead of"):
        reader.sequences(everything)


@pytest.mark.parametrize("moment", ["while it is built", "afterwards", "with the same content"])
def test_a_dataset_that_is_built_again_is_not_read(built: DataConfig, tmp_path: Path, moment: str) -> None:
    """Shards that are open stay what they were; a new one must not be mixed in, though size and name may fit."""
    shutil.copytree(built.dir, tmp_path / "d")
    config = run_config(built.model_copy(update={"dir": tmp_path / "d"}), S)
    reader = open_dataset(config).reader("train")
    manifest = tmp_path / "d" / "manifest.json"
    if moment == "while it is built":
        manifest.rename(tmp_path / "manifest.json")
    elif moment == "afterwards":
        other = load_manifest(built.dir).model_copy(update={"tokenizer_key": "another"}).sealed()
        manifest.write_bytes(to_json(other))
    else:
        content = manifest.read_bytes()
        manifest.unlink()
        manifest.write_bytes(content)
        reader.sequences(np.arange(4))
        return
    with pytest.raises(UsageError, match=r"\.tar: data\.dir=.*/d (was built|is being built) again"):
        reader.sequences(np.arange(4))


def test_heldout_batches_are_the_same_whatever_the_ranks_and_seeds(built: DataConfig, dataset: Dataset) -> None:
    reader = dataset.reader("heldout")
    expected = Counter(row.tobytes() for row in reader.sequences(np.arange(8))[:, :-1])
    for data_size in (1, 2, 4):
        ranks = [dataset.heldout_batches(data_rank=rank, data_size=data_size) for rank in range(data_size)]
        assert {len(batches) for batches in ranks} == {8 // data_size}
        assert Counter(row for batches in ranks for row in rows(list(batches))) == expected
    batches = dataset.heldout_batches(data_rank=0, data_size=1)
    assert rows(list(batches)) == rows(list(batches))
    reseeded = open_dataset(run_config(built.model_copy(update={"seed": 5}), S, train={"seed": 6}))
    assert rows(list(reseeded.heldout_batches(data_rank=0, data_size=1))) == rows(list(batches))
    order, other_order = (opened.reader("train").sequences(np.arange(8)) for opened in (dataset, reseeded))
    assert (order != other_order).any()


def test_evaluations_use_what_there_is_unless_told_otherwise(built: DataConfig) -> None:
    def used(multiple_of: int, length: int) -> int:
        return open_dataset(run_config(built, length, train={"evaluate_sequences": None})).evaluate_sequences(
            multiple_of
        )

    there = open_dataset(run_config(built, S)).heldout_sequences
    few = 8 * S
    fewer = open_dataset(run_config(built, few)).heldout_sequences
    assert there > 64 > fewer >= 6, "the sizes of this test"
    assert [used(n, S) for n in (1, 6)] == [64, 60]
    assert [used(n, few) for n in (1, 5)] == [fewer, fewer - fewer % 5]
    assert used(fewer + 1, few) == fewer + 1, "which is then refused"


def test_too_few_heldout_sequences_names_the_field(built: DataConfig) -> None:
    opened = open_dataset(run_config(built, S, train={"evaluate_sequences": 5000}))
    with pytest.raises(UsageError, match=r"train.evaluate_sequences=5000, but the held-out split .* has only \d+"):
        opened.heldout_batches(data_rank=0, data_size=1)


# Opening


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": {"vocab_size": 1024}},
            r"vocab_size=1024, but the dataset .* was built with 512; run `biroute",
        ),
        ({"heldout_fraction": 0.2}, r"data.heldout_fraction=0.2, but the dataset .* was built with 0.1"),
        ({"sources": [{"name": "other", "paths": ["x.txt"]}]}, r"data.sources=other, but .* english, chinese"),
        ({"dir": "no-such-folder"}, "data.dir=no-such-folder holds no dataset; run `biroute data build`"),
    ],
)
def test_a_configuration_that_does_not_fit_the_dataset(
    built: DataConfig, changes: dict[str, Any], message: str
) -> None:
    tree = built.model_dump() | changes
    with pytest.raises(UsageError, match=message):
        open_dataset(run_config(DataConfig.model_validate(tree), S))


def test_a_dataset_without_its_sources_opens(built: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(built.dir, tmp_path / "moved")
    bare = DataConfig.model_validate({"dir": tmp_path / "moved", "tokenizer": {"vocab_size": 512}})
    moved = open_dataset(run_config(bare, S))
    np.testing.assert_array_equal(
        moved.reader("train").sequence(0), open_dataset(run_config(built, S)).reader("train").sequence(0)
    )
