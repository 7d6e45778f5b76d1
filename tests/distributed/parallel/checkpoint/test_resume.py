"""Stopped and resumed equals never stopped, to the bit; and what becomes of damaged or foreign checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.pool import RankFailedError, WorkerPool
from helpers.training import Shards, merge, shards_of, small_config, start_engine, train

from biroute.parallel.checkpoint import save as save_module
from biroute.parallel.checkpoint.files import list_checkpoints
from biroute.parallel.checkpoint.load import load_checkpoint
from biroute.parallel.checkpoint.meta import TrainingProgress, read_meta
from biroute.parallel.checkpoint.reshard import join, reshard
from biroute.parallel.checkpoint.save import save_checkpoint
from biroute.parallel.engine.engine import Engine

Ranks = Callable[[int], WorkerPool]
ABOUT = {"model": {"model.hidden_size": 32}}
STOP, LAST = 3, 5

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2, ZeRO 0": {"parallel": {"tensor": 2, "zero_stage": 0}},
    "pipeline 2, ZeRO 0": {"parallel": {"pipeline": 2, "zero_stage": 0}},
    "pipeline 2, ZeRO 1": {"parallel": {"pipeline": 2, "zero_stage": 1}},
    "data 2, ZeRO 1": {"parallel": {"data": 2, "zero_stage": 1}},
    "data 2, ZeRO 2": {"parallel": {"data": 2, "zero_stage": 2}},
    "data 2, ZeRO 3": {"parallel": {"data": 2, "zero_stage": 3}},
    "region 2, ZeRO 0": {"parallel": {"region": 2, "zero_stage": 0}},
    "region 2, ZeRO 1": {"parallel": {"region": 2, "zero_stage": 1}},
    "region 2, ZeRO 3": {"parallel": {"region": 2, "zero_stage": 3}},
    "region 2, ZeRO 1, bf16": {"parallel": {"region": 2, "zero_stage": 1}, "train": {"precision": "bf16"}},
    "tensor 2, sequence parallel": {"parallel": {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}},
    "data 2, ZeRO 1, bf16": {"parallel": {"data": 2, "zero_stage": 1}, "train": {"precision": "bf16"}},
    "data 2, ZeRO 3, bf16": {"parallel": {"data": 2, "zero_stage": 3}, "train": {"precision": "bf16"}},
    "pipeline 2, ZeRO 1, bf16": {"parallel": {"pipeline": 2, "zero_stage": 1}, "train": {"precision": "bf16"}},
}


def whole_state(engine: Engine) -> Shards:
    return shards_of(engine, {name: engine.state.read(p) for name, p in engine.named_parameters()})


def save(engine: Engine, folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(engine, folder, TrainingProgress(step=step, sequences=step * 8), ABOUT, keep)


def uninterrupted_job(sections: dict[str, Any], folder: Path) -> tuple[Any, Shards]:
    engine = start_engine(small_config(**sections))
    reports = train(engine, range(1, STOP + 1))
    save(engine, folder, STOP)
    reports += train(engine, range(STOP + 1, LAST + 1))
    return reports, whole_state(engine)


def resumed_job(sections: dict[str, Any], folder: Path) -> tuple[Any, Shards, list[str]]:
    engine = start_engine(small_config(**sections), draw_weights=False)  # NaN: a weight that is not restored shows
    said: list[str] = []
    progress = load_checkpoint(engine, folder, ABOUT, said.append)
    assert progress == TrainingProgress(step=STOP, sequences=STOP * 8)
    return train(engine, range(STOP + 1, LAST + 1)), whole_state(engine), said


def assert_same_state(
    found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for kind, want in values.items():
            assert torch.equal(found[name][kind], want), f"{name} {kind}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    straight = ranks(2).run(uninterrupted_job, LAYOUTS[layout], tmp_path)
    resumed = ranks(2).run(resumed_job, LAYOUTS[layout], tmp_path)
    for (reports, _), (later, _, said) in zip(straight, resumed, strict=True):
        assert later == reports[STOP:]
        assert said == []
    assert_same_state(merge([s for _, s, _ in resumed]), merge([s for _, s in straight]))


def load_only_job(sections: dict[str, Any], folder: Path) -> tuple[Any, Shards]:
    engine = start_engine(small_config(**sections), draw_weights=False)
    progress = load_checkpoint(engine, folder, ABOUT, lambda _: None)
    return progress, whole_state(engine)


@pytest.mark.parametrize(
    "target",
    [
        {"tensor": 2, "zero_stage": 0},
        {"tensor": 1, "data": 2, "zero_stage": 3},
        {"pipeline": 2, "zero_stage": 1},
    ],
    ids=str,
)
def test_another_layout_reads_the_same_state(target: dict[str, int], ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(4).run(save_after_two_steps_job, {"parallel": {"tensor": 2, "data": 2, "zero_stage": 2}}, tmp_path)
    loaded = ranks(2).run(load_only_job, {"parallel": target}, tmp_path)
    assert all(progress == TrainingProgress(step=2, sequences=16) for progress, _ in loaded)
    assert_same_state(merge([shards for _, shards in loaded]), merge(saved))


def save_after_two_steps_job(sections: dict[str, Any], folder: Path) -> Shards:
    engine = start_engine(small_config(**sections))
    train(engine, (1, 2))
    save(engine, folder, 2)
    return whole_state(engine)


def paced_save_job(folder: Path) -> tuple[int, int, list[int]]:
    """Save files of many pieces, rank 1's four times as large; how often this rank was told of progress, its number
    of parameters, and the whole pieces of each rank's file."""
    engine = start_engine(small_config(parallel={"tensor": 2, "zero_stage": 0}))
    if dist.get_rank() == 1:
        read = engine.state.read
        engine.state.read = lambda p, keep=True: {  # type: ignore[method-assign]
            kind: value.repeat(4, *[1] * (value.dim() - 1)) for kind, value in read(p, keep).items()
        }
    told: list[int] = []
    with patch.object(save_module, "PIECE_BYTES", 4096):
        path = save_checkpoint(
            engine, folder, TrainingProgress(step=1, sequences=8), ABOUT, 1, reached=lambda: told.append(1)
        )
    sizes = [entry.bytes for _, entry in sorted(read_meta(path).files.items())]
    return len(told), len(list(engine.named_parameters())), [size // 4096 for size in sizes]


def test_ranks_that_wait_for_a_large_file_see_it_grow(ranks: Ranks, tmp_path: Path) -> None:
    """Their watchdogs would otherwise end the run in the midst of a long save, which progresses."""
    found = ranks(2).run(paced_save_job, tmp_path)
    for told, parameters, (smaller, larger) in found:
        assert larger > smaller + 10
        assert told == parameters + larger


def three_checkpoints_job(folder: Path) -> list[str]:
    engine = start_engine(small_config())
    for step in (1, 2, 3):
        train(engine, (step,))
        save(engine, folder, step)
    return [path.name for path in list_checkpoints(folder)]


def load_job(folder: Path, about: dict[str, Any]) -> tuple[Any, list[str]]:
    said: list[str] = []
    return load_checkpoint(start_engine(small_config()), folder, about, said.append), said


@pytest.fixture(scope="module")
def checkpoints(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (names,) = ranks(1).run(three_checkpoints_job, folder)
    assert names == ["step-00000003", "step-00000002"], "the two newest are kept"
    return folder


def damaged(checkpoints: Path, tmp_path: Path, damage: Callable[[Path], None], every: bool = False) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints, folder)
    for path in list_checkpoints(folder)[: None if every else 1]:
        damage(path)
    return folder


def flip_a_byte(path: Path) -> None:
    file = next(path.glob("weights-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(path: Path) -> None:
    file = next(path.glob("weights-*"))
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped byte": flip_a_byte,
    "a truncated file": cut_short,
    "a missing file": lambda path: next(path.glob("weights-*")).unlink(),
    "no meta.json": lambda path: (path / "meta.json").unlink(),
    "half of meta.json": lambda path: (path / "meta.json").write_text((path / "meta.json").read_text()[:200]),
    "an empty meta.json": lambda path: (path / "meta.json").write_text("{}"),
    "a list as meta.json": lambda path: (path / "meta.json").write_text("[]"),
    "a lost parameter": lambda path: forget_a_parameter(path),
}


def forget_a_parameter(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    meta["parameters"].popitem()
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_says_so(damage: str, checkpoints: Path, ranks: Ranks, tmp_path: Path) -> None:
    folder = damaged(checkpoints, tmp_path, DAMAGES[damage])
    ((progress, said),) = ranks(1).run(load_job, folder, ABOUT)
    assert progress == TrainingProgress(step=2, sequences=16)
    assert len(said) == 1
    assert "step-00000003" in said[0]


def test_unfinished_folder_is_not_a_checkpoint(checkpoints: Path, ranks: Ranks, tmp_path: Path) -> None:
    folder = damaged(checkpoints, tmp_path, lambda path: path.rename(path.with_name(path.name + ".partial")) and None)
    ((progress, said),) = ranks(1).run(load_job, folder, ABOUT)
    assert (progress, said) == (TrainingProgress(step=2, sequences=16), [])


def test_no_checkpoint_at_all(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1).run(load_job, tmp_path, ABOUT) == [(None, [])]


def test_only_damaged_ones_is_an_error(checkpoints: Path, ranks: Ranks, tmp_path: Path) -> None:
    folder = damaged(checkpoints, tmp_path, flip_a_byte, every=True)
    with pytest.raises(RankFailedError, match=r"UsageError: .*no checkpoint is valid"):
        ranks(1).run(load_job, folder, ABOUT)


def test_checkpoint_of_another_model(checkpoints: Path, ranks: Ranks) -> None:
    about = {"model": {"model.hidden_size": 64}}
    with pytest.raises(RankFailedError, match=r"another model \(model.hidden_size: 32 there, 64 here\)"):
        ranks(1).run(load_job, checkpoints, about)


def full_disk_job(folder: Path) -> tuple[str, list[str]]:
    engine = start_engine(small_config())
    train(engine, (1,))
    try:
        for step in range(1, 40):
            save(engine, folder, step, keep=40)
    except Exception as error:
        return f"{type(error).__name__}: {error}", [path.name for path in list_checkpoints(folder)]
    return "it all fitted", []


def test_full_disk_keeps_the_last_checkpoint(ranks: Ranks, small_disk: Path) -> None:
    (message, left), *others = ranks(2).run(full_disk_job, small_disk)
    assert message.startswith("SaveError: ")
    assert "the disk is full" in message
    assert left
    assert all(other == (message, left) for other in others), "every rank says the same"
    ((progress, said),) = ranks(1).run(load_job, small_disk, ABOUT)
    assert (f"step-{progress.step:08d}", said) == (left[0], [])
    assert not list(small_disk.glob("*.partial")), "what was half written is gone"


def test_meta_names_every_file(checkpoints: Path) -> None:
    newest = list_checkpoints(checkpoints)[0]
    meta = json.loads((newest / "meta.json").read_text())
    assert set(meta["files"]) == {path.name for path in newest.iterdir()} - {"meta.json"}
    expected = {"step": 3, "skipped_steps": 0, "sequences": 24, "tokens": 0, "gradient_norms": []}
    assert meta["progress"] == expected | {"evaluation_pending": False}


@pytest.mark.parametrize(("stride", "parts"), [(1, 2), (2, 2), (2, 4), (2, 1)])
def test_reshard_is_undone_by_its_inverse(stride: int, parts: int) -> None:
    whole = torch.arange(16 * 3).reshape(16, 3)
    shards = [reshard([whole], 0, stride, 2, part) for part in range(2)]
    again = [reshard(shards, 0, stride, parts, part) for part in range(parts)]
    assert torch.equal(reshard(again, 0, stride, 1, 0), whole)
    assert torch.equal(join(again, (0, stride)), whole)
    if stride == 2:
        assert torch.equal(shards[0], torch.cat([whole[:4], whole[8:12]])), "half of the gate, half of the up rows"


def test_of_other_shards_nothing_is_read() -> None:
    whole = torch.arange(16 * 3).reshape(16, 3)
    first, second = (reshard([whole], 0, 2, 2, part) for part in range(2))
    unreadable = torch.empty_like(first, device="meta")
    assert torch.equal(reshard([first, unreadable], 0, 2, 4, 1), torch.cat([whole[2:4], whole[10:12]]))
    assert torch.equal(reshard([unreadable, second], 0, 2, 4, 2), torch.cat([whole[4:6], whole[12:14]]))


def write_own_job(sections: dict[str, Any]) -> int:
    """Write the state again, with moments that cannot be read where DeepSpeed keeps them on other ranks alone."""
    engine = start_engine(small_config(**sections))
    train(engine, [1])
    before = {name: engine.state.read(parameter) for name, parameter in engine.named_parameters()}
    elsewhere = 0
    for name, parameter in engine.named_parameters():
        state = dict(before[name])
        if parameter._hp_mapping is None:  # type: ignore[attr-defined]
            state |= {kind: value.to("meta") for kind, value in state.items() if kind != "weight"}
            elsewhere += 1
        engine.state.write(parameter, state)
        assert engine.state.read(parameter, keep=False) == {}, "for another rank's file: nothing is copied"
    for name, parameter in engine.named_parameters():
        for kind, value in engine.state.read(parameter).items():
            assert torch.equal(value, before[name][kind]), f"{name} {kind}"
    return elsewhere


@pytest.mark.parametrize("layout", ["data 2, ZeRO 1", "data 2, ZeRO 1, bf16"])
def test_a_rank_reads_its_own_moments_alone(layout: str, ranks: Ranks) -> None:
    """A resumed run would otherwise read and move both moments of the whole model on every rank."""
    assert min(ranks(2).run(write_own_job, LAYOUTS[layout])) > 3
