"""`biroute bench logging` on a small model."""

from __future__ import annotations

import pytest
from helpers.training import small_config

from biroute.launcher.bench.logging import LOGGED, PLAIN, SAMPLED, logging_page, run_bench


def test_cost_is_that_of_a_log_point_and_of_sampling_spread_over_the_steps_between() -> None:
    config = small_config(train={"log_every": 5, "route_metrics_every": 4})
    answer = run_bench(config, rounds=3)
    seconds = answer["seconds"]
    assert all(len(values) == 3 for values in seconds.values())
    assert min(seconds["log point"]) > 0 and max(seconds["routing health"]) > 0, "the routes are sampled"
    plain = sorted(seconds[PLAIN])[1]
    want = [
        100 * (log / 5 + health / 20) / plain
        for log, health in zip(seconds["log point"], seconds["routing health"], strict=True)
    ]
    assert answer["cost_percent"] == pytest.approx(want)
    page = logging_page(answer)
    text = " ".join(part if isinstance(part, str) else part.markdown() for part in page.parts)
    assert all(name in text for name in (PLAIN, LOGGED, SAMPLED)) and "every 5 steps" in text
