"""Routes of training steps, sampled in every layout without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, train

Ranks = Callable[[int], WorkerPool]
MODEL = {"num_layers": 6, "sequence_length": 64, "dense_layers": [1], "sliding_window_layers": [2]}


def health_job(parallel: dict[str, int], checkpointing: bool) -> tuple[dict[str, float], bool]:
    """Health of the second of three steps, and whether all losses and norms are those of steps not sampled."""
    from biroute.launcher.train.routing_health import RoutingHealth

    config = small_config(
        model=MODEL, parallel=parallel, train={"microbatch_size": 1, "activation_checkpointing": checkpointing}
    )
    plain = train(start_engine(config), range(1, 4))
    engine = start_engine(config)
    health = RoutingHealth(config, engine)
    reports = train(engine, [1])
    with health.sampling():
        reports += train(engine, [2])
    found = health.gather()
    return found, reports + train(engine, [3]) == plain


@cache
def alone(_: int = 0) -> dict[str, float]:
    found, same = WorkerPool(1).run(health_job, {}, False)[0]
    assert same
    return found


def test_layers_are_named_and_averaged() -> None:
    found = alone()
    layers = {name.split("/")[1] for name in found if name.count("/") == 2}
    assert layers == {"layer_00", "layer_03", "layer_04", "layer_05"}  # the others don't choose
    assert found["routing/own"] == pytest.approx(sum(found[f"routing/layer_{n:02d}/own"] for n in (0, 3, 4, 5)) / 4)
    assert "routing/layer_03/layer_overlap" not in found and 0 < found["routing/layer_04/layer_overlap"] < 1


@pytest.mark.parametrize(
    ("parallel", "checkpointing"),
    [({"data": 2}, True), ({"tensor": 2}, False), ({"pipeline": 2}, False), ({"region": 2}, False)],
)
def test_every_layout_samples_the_same_and_trains_the_same(
    ranks: Ranks, parallel: dict[str, int], checkpointing: bool
) -> None:
    results = ranks(2).run(health_job, parallel, checkpointing)
    assert all(same for _, same in results), "to the bit"
    assert results[0][0] == results[1][0], "both ranks know all"
    cut = {"pipeline": "layer_03/layer_overlap", "region": "block_overlap"}.get(next(iter(parallel)), "none")
    found, want = (
        {name: value for name, value in one.items() if not name.endswith(cut)} for one in (results[0][0], alone())
    )
    # Sums of other layouts round otherwise, and a close choice may fall otherwise.
    assert found == pytest.approx(want, abs=0.02)


def settings(corpus: Path, run_dir: Path, every: int) -> dict[str, Any]:
    tree = small_run(corpus, run_dir, steps=9, parallel={})
    tree["train"] |= {"log_every": 2, "route_metrics_every": every, "evaluate_every": 0}
    return tree


def test_the_field_says_when(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    assert ranks(1).run(run_job, settings(corpus, tmp_path / "some", 2)) == ["finished"]
    assert ranks(1).run(run_job, settings(corpus, tmp_path / "none", 0)) == ["finished"]
    assert [step for step, _ in points_of(tmp_path / "some", "routing/layer_01/entropy")] == [1, 4, 8, 9]
    assert points_of(tmp_path / "none", "routing/entropy") == []
    assert points_of(tmp_path / "some") == points_of(tmp_path / "none"), "the same losses"
