"""What may change when a run resumes from a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from biroute.configs.changes import compare_settings, settings_to_compare
from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.configs.section import fields_on_resume

KINDS = dict(fields_on_resume(RunConfig))
SOURCES = [{"name": "a", "paths": ["a.txt"], "weight": 1.0}, {"name": "b", "paths": ["b.txt"], "weight": 2.0}]


def settings(tree: dict[str, Any], dataset: str = "feed") -> dict[str, str]:
    return settings_to_compare(config_from_tree(tree, "test"), dataset)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"model": {"norm_epsilon": 1e-6}}, "model.norm_epsilon: 1e-05 there, 1e-06 here"),
        ({}, {"model": {"rope_base": 5e5}}, "model.rope_base: 10000.0 there, 500000.0 here"),
        ({}, {"model": {"attention": {"kind": "dense"}}}, "model.attention.kind: bi_level there, dense here"),
        ({}, {"model": {"attention": {"region_size": 32}}}, "model.attention.region_size: 16 there, 32 here"),
        ({}, {"model": {"dense_layers": [0]}}, "model.dense_layers: [] there, [0] here"),
        ({}, {"model": {"sequence_length": 2048}}, "model.sequence_length: 1024 there, 2048 here"),
        ({}, {"data": {"seed": 7}}, "data.seed: 0 there, 7 here"),
        ({}, {"train": {"seed": 7}}, "train.seed: 0 there, 7 here"),
        (
            {"data": {"sources": SOURCES}},
            {"data": {"sources": [SOURCES[0] | {"weight": 3.0}, SOURCES[1]]}},
            "data.sources.weight: a 1.0, b 2.0 (mix 2) there, a 3.0, b 2.0 (mix 2) here",
        ),
    ],
)
def test_another_identity_is_refused_and_can_be_accepted(
    before: dict[str, Any], now: dict[str, Any], named: str
) -> None:
    saved, ours = settings(before), settings(now)
    with pytest.raises(UsageError) as error:
        compare_settings(saved, ours, [])
    assert named in str(error.value)
    field = named.partition(":")[0]
    assert f"'train.accept_changes=[{field}]'" in str(error.value)
    there, here = named.removeprefix(f"{field}: ").removesuffix(" here").split(" there, ", 1)
    accepted = compare_settings(saved, ours, [field])
    assert accepted == [f"changed since the checkpoint: {field}: {there} -> {here} (accepted)"]
    config_from_tree(now | {"train": now.get("train", {}) | {"accept_changes": [field]}}, "test")


def test_another_dataset_is_refused_and_can_be_accepted() -> None:
    saved, ours = settings({}), settings({}, "beef")
    with pytest.raises(UsageError, match=r"\(data: feed there, beef here\).*accept_changes=\[data\]"):
        compare_settings(saved, ours, [])
    assert compare_settings(saved, ours, ["data"]) == ["changed since the checkpoint: data: feed -> beef (accepted)"]


def test_another_recipe_is_taken_and_said() -> None:
    now = {"optim": {"learning_rate": 0.001}, "train": {"steps": 2000, "precision": "bf16", "global_batch_size": 32}}
    assert compare_settings(settings({}), settings(now), []) == [
        "changed since the checkpoint: optim.learning_rate: 0.0003 -> 0.001",
        "changed since the checkpoint: train.steps: 1000 -> 2000",
        "changed since the checkpoint: train.global_batch_size: 16 -> 32",
        "changed since the checkpoint: train.precision: fp32 -> bf16",
    ]


def test_where_and_how_the_same_training_runs_is_free() -> None:
    now = {
        "parallel": {"tensor": 2, "zero_stage": 3},
        "train": {"run_dir": "elsewhere", "microbatch_size": 1, "log_every": 1, "activation_checkpointing": True},
        "checkpoint": {"keep": 5},
        "tracking": {"experiment": "another"},
        "data": {"dir": "elsewhere", "workers": 3},
        "slurm": {"nodes": 4},
    }
    assert compare_settings(settings({}), settings(now), []) == []


def test_an_older_checkpoint_is_compared_in_what_it_has() -> None:
    assert compare_settings({}, settings({"data": {"seed": 7}}), []) == []


def test_every_field_of_the_model_is_identity_and_of_the_optimizer_recipe() -> None:
    assert {kind for name, kind in KINDS.items() if name.startswith("model.")} == {"identity"}
    assert {kind for name, kind in KINDS.items() if name.startswith("optim.")} == {"recipe"}
    others = ("parallel.", "checkpoint.", "tracking.", "slurm.")
    assert {kind for name, kind in KINDS.items() if name.startswith(others)} == {"free"}


@pytest.mark.parametrize("name", ["model.rope_bass", "optim.learning_rate", "train.steps", "data.dir", ""])
def test_only_what_would_be_refused_can_be_accepted(name: str) -> None:
    with pytest.raises(UsageError, match="not a field that a resume refuses to change"):
        config_from_tree({"train": {"accept_changes": [name]}}, "test")
