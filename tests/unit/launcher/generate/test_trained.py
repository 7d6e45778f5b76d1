"""Which checkpoint and which tokenizer a run is used with, and what is said where one is missing or damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cached import cached_model

from biroute.configs.changes import settings_to_compare
from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree, write_config
from biroute.configs.schema import DataConfig, RunConfig
from biroute.data_pipeline.prepare.tokenizer import load_tokenizer
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import Trained, choose_device, open_trained
from biroute.launcher.train.identity import model_identity
from biroute.parallel.checkpoint.meta import META_NAME, CheckpointMeta, ParameterFiles, TrainingProgress
from biroute.parallel.checkpoint.save import write_file


def config_of(run_dir: Path, data: DataConfig, **model: Any) -> RunConfig:
    tokenizer = load_tokenizer(data.dir / "tokenizer.model")
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "sequence_length": 32}
    attention = {"region_size": 4, "topk": 3} | model.pop("attention", {})
    return config_from_tree(
        {
            "model": sizes | {"attention": attention} | model,
            "data": {"dir": str(data.dir), "tokenizer": {"vocab_size": tokenizer.vocab_size}},
            "train": {"run_dir": str(run_dir)},
        },
        "test",
    )


def save(run_dir: Path, config: RunConfig, data: DataConfig, step: int) -> torch.Tensor:
    """Write a checkpoint as a single rank does; returns the weight of its last norm."""
    causal = config.model_copy(update={"model": config.model.model_copy(update={"objective": "causal"})})
    weights = dict(cached_model(causal).layers.named_weights())
    weights["norm.weight"] = weights["norm.weight"] + step
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    name = "weights-pipe00-tensor00-part00.pt"
    content = {key: {"state": {"weight": weight.detach()}, "split": None} for key, weight in weights.items()}
    fingerprint = load_tokenizer(data.dir / "tokenizer.model").fingerprint
    meta = CheckpointMeta(
        progress=TrainingProgress(step=step, sequences=step),
        about={"model": model_identity(config, fingerprint), "settings": settings_to_compare(config, "")},
        files={name: write_file(folder / name, content)},
        parameters={key: ParameterFiles(files={0: name}, split=None) for key in weights},
    )
    (folder / META_NAME).write_text(meta.model_dump_json())
    return weights["norm.weight"].detach()


@pytest.fixture
def run(tmp_path: Path, built: DataConfig) -> Path:
    """A run with checkpoints of steps 1 and 2 that keeps its tokenizer."""
    config = config_of(tmp_path, built)
    write_config(tmp_path / "config.yaml", config)
    shutil.copy(built.dir / "tokenizer.model", tmp_path)
    for step in (1, 2):
        save(tmp_path, config, built, step)
    return tmp_path


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / "weights-pipe00-tensor00-part00.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def opened(run: Path, say: Callable[[str], None] = lambda _: None, **choice: Any) -> Trained:
    return open_trained(ModelChoice(run, **choice), say)


def test_the_newest_or_the_one_that_is_named(run: Path) -> None:
    said: list[str] = []
    newest, first = opened(run, say=said.append), opened(run, step=1, say=said.append)
    assert [one.meta.progress.step for one in (newest, first)] == [2, 1] and not said
    norms = [dict(one.model.layers.named_weights())["norm.weight"] for one in (newest, first)]
    assert torch.allclose(norms[0] - norms[1], torch.ones(32), atol=1e-6)
    with pytest.raises(UsageError, match="no checkpoint of step 7; it has 2, 1"):
        opened(run, step=7)


def test_a_damaged_checkpoint_is_passed_over_and_said_unless_it_is_named(run: Path) -> None:
    damage(run, 2)
    said: list[str] = []
    assert opened(run, say=said.append).meta.progress.step == 1
    assert len(said) == 1 and "size or checksum differs" in said[0] and said[0].endswith("trying the one before it")
    with pytest.raises(UsageError, match="step-00000002: damaged checkpoint"):
        opened(run, step=2)
    meta = run / "checkpoints" / "step-00000002" / META_NAME
    meta.write_text(meta.read_text()[:-9])
    with pytest.raises(UsageError, match=r"meta\.json is unreadable .*; choose another with --checkpoint"):
        opened(run, step=2)
    assert opened(run, say=said.append).meta.progress.step == 1
    assert "step-00000002: meta.json is unreadable" in said[1] and said[1].endswith("trying the one before it")
    damage(run, 1)
    with pytest.raises(UsageError, match="no checkpoint is valid; restore one"):
        opened(run)


def test_a_checkpoint_that_the_run_removes_meanwhile_gives_way_to_its_newest(run: Path, built: DataConfig) -> None:
    config, damaged = config_of(run, built), list[str]()
    damage(run, 2)

    def train_on(line: str) -> None:  # while step 2 was read: keep=1
        damaged.append(line)
        if len(damaged) == 1:
            save(run, config, built, 3)
            shutil.rmtree(run / "checkpoints" / "step-00000001")
            shutil.rmtree(run / "checkpoints" / "step-00000002")

    assert opened(run, say=train_on).meta.progress.step == 3


def test_folders_that_are_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere has no folder checkpoints; name a run folder"):
        opened(tmp_path / "nowhere")
    (run / "config.yaml").rename(run / "other.yaml")
    with pytest.raises(UsageError, match=r"has no config\.yaml, so its model is not known"):
        opened(run)
    (run / "other.yaml").rename(run / "config.yaml")
    assert opened(run / "config.yaml").meta.progress.step == 2  # a run by its configuration
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="has no complete checkpoint"):
        opened(run)


def test_the_tokenizer_is_the_runs_or_the_datasets_or_the_one_that_is_named(run: Path, built: DataConfig) -> None:
    (run / "tokenizer.model").rename(run / "elsewhere.model")
    (run / "tokenizer.model").write_bytes(b"damaged")
    assert opened(run).tokenizer.encode("a")  # the dataset's
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["dir"] = str(run / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError, match=r"\(\w{12}\) is missing: \S+/tokenizer.model: .* damaged one; name its"):
        opened(run)
    (run / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match=r"\(\w{12}\) is missing: it is not in .*; name its file with"):
        opened(run)
    assert opened(run, tokenizer=run / "elsewhere.model").tokenizer.encode("a")


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    path = next(iter((run / "checkpoints").glob("step-00000002"))) / META_NAME
    path.write_text(path.read_text().replace('"tokenizer fingerprint":"', '"tokenizer fingerprint":"0'))
    with pytest.raises(UsageError, match=r"is missing: .* is another one"):
        opened(run)


def test_settings_that_have_changed_since_are_those_of_the_checkpoint(run: Path, built: DataConfig) -> None:
    later = config_of(run, built, rope_base=500.0, dense_layers=[0], attention={"topk": 5})
    write_config(run / "config.yaml", later)
    said: list[str] = []
    model = opened(run, say=said.append).config.model
    assert (model.rope_base, model.dense_layers, model.attention.topk) == (10_000.0, (), 3)
    assert "model.attention.topk: 3, now 5" in said[0] and "those of the checkpoint are used" in said[0]


def test_a_tuple_of_the_checkpoint_is_read_back(tmp_path: Path, built: DataConfig) -> None:
    save(tmp_path, config_of(tmp_path, built, num_layers=2, dense_layers=[0, 1]), built, 1)
    write_config(tmp_path / "config.yaml", config_of(tmp_path, built, num_layers=2, dense_layers=[1]))
    assert opened(tmp_path).config.model.dense_layers == (0, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    save(tmp_path, config_of(tmp_path, built, num_layers=2, dense_layers=[0]), built, 1)
    assert opened(tmp_path).config.model.dense_layers == (0,)


def test_a_model_of_masked_tokens_cannot_continue(tmp_path: Path, built: DataConfig) -> None:
    config = config_of(tmp_path, built, objective="mlm")
    save(tmp_path, config, built, 1)
    write_config(tmp_path / "config.yaml", config)
    with pytest.raises(UsageError, match="objective=mlm predicts masked tokens and cannot continue"):
        opened(tmp_path)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--device=tpu is unknown; use auto, cpu or cuda"):
        ModelChoice(Path("run"), device="tpu")
    with pytest.raises(UsageError, match="--precision=fp8 is unknown; use fp32 or bf16"):
        ModelChoice(Path("run"), precision="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device=cuda: torch sees no GPU here"):
            choose_device("cuda")
