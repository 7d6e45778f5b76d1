"""Loading a configuration, and what follows from it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from biroute.configs.errors import UsageError
from biroute.configs.layout import microbatches_per_step, resolve_layout
from biroute.configs.load import config_from_tree, dump_config, flatten, load_config
from biroute.configs.reference import reference
from biroute.configs.schema import RunConfig
from biroute.launcher.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config_from_tree(yaml.safe_load(dump_config(config)), "dump") == config


def test_overrides_win_and_reach_every_depth() -> None:
    config = load_config(
        SHIPPED[0], ["train.steps=7", "model.attention.topk=5", "optim.learning_rate=3e-3", "model.dense_layers=[0]"]
    )
    assert (config.train.steps, config.model.attention.topk) == (7, 5)
    assert (config.optim.learning_rate, config.model.dense_layers) == (3e-3, (0,))


def test_derived_sizes_follow() -> None:
    config = config_from_tree({"model": {"hidden_size": 384, "num_heads": 6}}, "test")
    assert (config.model.head_size, config.model.ffn_hidden_size) == (64, 1024)
    assert config_from_tree({"data": {"tokenizer": {"vocab_size": 1000}}}, "test").padded_vocab_size == 1024


def test_flat_names_are_those_of_overrides() -> None:
    flat = flatten(config_from_tree({}, "test"))
    assert flat["model.attention.topk"] == "8"
    with pytest.raises(UsageError, match="unknown key"):
        load_config(SHIPPED[0], ["model.attention.topq=3"])


def test_layout_fills_data_from_the_processes() -> None:
    config = config_from_tree({"parallel": {"tensor": 2}, "train": {"global_batch_size": 24}}, "test")
    layout = resolve_layout(config, 4)
    assert (layout.tensor, layout.data, layout.world_size) == (2, 2, 4)
    assert microbatches_per_step(config, layout) == 3


def test_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "run `make docs`"


def test_every_field_is_described() -> None:
    def undescribed(section: type, prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            if not field.description:
                found.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                found += undescribed(field.annotation, f"{prefix}{name}.")
        return found

    assert undescribed(RunConfig, "") == []


def schedule_of(**optim: object) -> list[float]:
    config = config_from_tree({"optim": {"learning_rate": 1.0, "min_learning_rate": 0.1, **optim}}, "test").optim
    return [learning_rate(config, step, 100) for step in range(1, 101)]


def test_schedules() -> None:
    cosine = schedule_of(warmup_steps=10)
    assert cosine[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert cosine[54] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(cosine[9:]))
    stable = schedule_of(schedule="wsd", warmup_steps=10, decay_steps=20)
    assert stable[9:80] == [1.0] * 71
    assert stable[89] == pytest.approx(0.55)
    assert stable[-1] == pytest.approx(0.1)
    assert schedule_of(schedule="constant", warmup_steps=0) == [1.0] * 100


@pytest.mark.parametrize(
    ("field", "tree"),
    [
        ("parallel.region=2", {"parallel": {"region": 2}}),
        ("train.precision=bf16", {"train": {"precision": "bf16"}}),
        ("train.device=cuda", {"train": {"device": "cuda"}}),
    ],
)
def test_exact_sums_is_refused_where_it_could_not_be(field: str, tree: dict[str, dict[str, object]]) -> None:
    train = {"exact_sums": True, **tree.get("train", {})}
    with pytest.raises(UsageError, match=f"train.exact_sums with {field}: .* leave .* out"):
        config_from_tree(tree | {"train": train}, "test")
    assert config_from_tree({"train": {"exact_sums": True}}, "test").train.exact_sums
