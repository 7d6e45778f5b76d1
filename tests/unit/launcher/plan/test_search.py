"""All layouts of some devices: legal ones are ranked, the others are counted by reason."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from helpers.public_runs import profile

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.prediction import make_plan
from biroute.launcher.plan.report import as_values, nothing_fits, plan_table, search_table
from biroute.launcher.plan.scaling import scaled
from biroute.launcher.plan.search import TOO_LARGE, reason_of, remedy, search_layouts

H100 = profile("h100")


def config(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "sequence_length": 256},
        "train": {"global_batch_size": 8, "microbatch_size": 1},
    }
    for section, fields in sections.items():
        tree.setdefault(section, {}).update(fields)
    return config_from_tree(tree, "test")


def test_every_layout_is_ranked_or_counted() -> None:
    found = search_layouts(config(), 4, H100, 0.4)
    tried = [
        axes for axes in product((1, 2, 4), repeat=3) if 4 % (axes[0] * axes[1] * axes[2]) == 0
    ]  # tensor, region, pipeline
    expected = sum(16 if tensor > 1 else 8 for tensor, *_ in tried)
    assert len(found.plans) + sum(found.dropped.values()) == expected
    for plan in found.plans:
        assert resolve_layout(plan.config, 4) == plan.layout  # the check of a run
    times = [plan.step.total for plan in found.plans]
    assert times == sorted(times)
    assert "parallel.tensor does not divide model.num_kv_heads (2)" in found.dropped
    pipelines = sum((16 if tensor > 1 else 8) / 2 for tensor, _, pipe in tried if pipe > 1)
    assert found.dropped["pipeline with zero_stage: DeepSpeed pipelines support ZeRO 0 and 1 only"] == pipelines


def test_what_is_too_large_falls_out() -> None:
    everything = search_layouts(config(), 4, H100, 0.4)
    median = sorted(plan.memory.total for plan in everything.plans)[len(everything.plans) // 2]
    found = search_layouts(config(), 4, H100.model_copy(update={"memory_gib": median / 2**30}), 0.4)
    assert 0 < found.dropped[TOO_LARGE] < len(everything.plans)
    assert len(found.plans) + found.dropped[TOO_LARGE] == len(everything.plans)
    assert f"fell out: {found.dropped[TOO_LARGE]:5} {TOO_LARGE}" in search_table(found)


def test_where_nothing_fits_the_least_memory_is_named() -> None:
    everything = search_layouts(config(), 4, H100, 0.4).plans
    least = min(plan.memory.total for plan in everything)
    found = search_layouts(config(), 4, H100.model_copy(update={"memory_gib": (least - 2**20) / 2**30}), 0.4)
    assert not found.plans and found.smallest is not None and found.smallest.memory.total == least
    assert f"least memory: {found.smallest.layout}, recompute" in search_table(found)
    assert "1.00 MiB too much\n" in search_table(found)
    assert nothing_fits(found.smallest).endswith("1.00 MiB too few; plan more --nodes")


def test_no_legal_layout_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--search: no layout of 7 ranks is legal; the commonest reason"):
        search_layouts(config(), 7, H100, 0.4)


def test_reasons_of_layouts_that_differ_in_numbers_are_one() -> None:
    one = "train.global_batch_size=8 is not a multiple of train.microbatch_size x data ranks = 2 x 8 = 16; use 16"
    assert reason_of(one) == reason_of(one.replace("2 x 8 = 16; use 16", "1 x 16 = 16; use 16"))
    assert reason_of("parallel.tensor=4 does not divide x (2); use 1") == "parallel.tensor does not divide x (2)"


def test_a_remedy_fits_and_is_the_first_that_does() -> None:
    large = config(model={"hidden_size": 2048, "num_layers": 8, "sequence_length": 4096})
    layout = resolve_layout(large, 8)
    plan = make_plan(large, layout, H100, 0.4)
    activations = plan.memory.activations
    tight = H100.model_copy(update={"memory_gib": (plan.memory.total - activations / 2) / 2**30})
    assert remedy(make_plan(large, layout, tight, 0.4)) == "train.activation_checkpointing=true"
    tiny = H100.model_copy(update={"memory_gib": 0.001})
    too_large = make_plan(large, layout, tiny, 0.4)
    assert remedy(too_large) is None
    assert "too much; try --search, or more nodes" in plan_table([too_large])


def test_weak_scaling_keeps_the_sequences_of_a_rank() -> None:
    plan = make_plan(config(), resolve_layout(config(), 8), H100, 0.4)
    points = list(scaled(plan, "weak", most_nodes=64))
    assert [devices for devices, _ in points] == [8, 16, 32, 64, 128, 256, 512]
    for devices, one in points:
        assert one.config.train.global_batch_size == devices
        assert one.work.microbatches == 1
    assert points[-1][1].step.total > points[0][1].step.total  # the network of several nodes


def test_strong_scaling_ends_with_the_batch() -> None:
    wide = config(train={"global_batch_size": 32})
    points = list(scaled(make_plan(wide, resolve_layout(wide, 8), H100, 0.4), "strong"))
    assert [(devices, one.work.microbatches) for devices, one in points] == [(8, 4), (16, 2), (32, 1)]
    assert {one.config.train.global_batch_size for _, one in points} == {32}


def test_a_table_and_its_values_say_the_same() -> None:
    plan = make_plan(
        config(), resolve_layout(config(), 8), H100.model_copy(update={"price_per_device_hour": 3.0}), 0.4
    )
    table, values = plan_table([plan]), as_values(plan)
    assert f"{values['tokens_per_second']:,.0f}" in table
    assert f"{values['mfu']:.1%}" in table
    assert values["memory_bytes"]["total"] == pytest.approx(sum(plan.memory.parts().values()))
    assert values["cost"] == 3 * values["device_hours"]
    assert values["fits"] is True
    assert any(one.startswith("matrix products and attention reach 0.475") for one in values["assumed"])
