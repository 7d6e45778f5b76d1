"""Which rank is called slow, and when it is said."""

from __future__ import annotations

import pytest

from biroute.configs.layout import Layout
from biroute.launcher.train.stragglers import POINTS, Stragglers
from biroute.parallel.mesh.rank_order import coordinates_of


def phases(own: float, exchange: float = 0.0, data: float = 0.01) -> dict[str, float]:
    return {"data": data, "forward": own / 3, "backward": own * 2 / 3, "exchange": exchange, "optimizer": 0.1}


def test_waiting_for_others_is_no_work() -> None:
    """All steps take equally long; the rank that waits least is the slow one."""
    stragglers = Stragglers(Layout(tensor=1, region=1, data=4, pipe=1, zero_stage=1), ["a"] * 4, lambda _: None)
    ranks = [phases(1.0, 0.8), phases(1.0, 0.8), phases(1.8, 0.0), phases(1.1, 0.7)]
    found = stragglers.judge(ranks)
    assert found == {"throughput/slowest_rank": 2, "throughput/slowest_rank_ratio": pytest.approx(1.81 / 1.01)}


def test_ranks_are_compared_with_those_that_do_the_same() -> None:
    layout = Layout(pipe=2, data=2, region=2, tensor=1, zero_stage=1)
    times = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 5.0, (1, 1): 9.0}  # by pipeline stage and place in the sequence
    places = [coordinates_of(layout, rank) for rank in range(8)]
    ranks = [phases(times[at.pipe, at.region]) for at in places]
    stragglers = Stragglers(layout, ["a"] * 8, lambda _: None)
    assert stragglers.judge(ranks)["throughput/slowest_rank_ratio"] == pytest.approx(1.0)
    slow = next(n for n, at in enumerate(places) if (at.pipe, at.region, at.data) == (0, 1, 1))
    ranks[slow] = phases(3.0)
    assert stragglers.judge(ranks)["throughput/slowest_rank"] == slow
    assert (
        Stragglers(Layout(pipe=2, data=1, region=1, tensor=1, zero_stage=1), ["a"] * 2, print).judge(ranks[:2]) == {}
    )


def test_it_is_said_after_some_points_in_a_row_and_once_an_hour() -> None:
    said, clock = list[str](), [0.0]
    stragglers = Stragglers(
        Layout(tensor=1, region=1, data=2, pipe=1, zero_stage=1), ["node-a", "node-b"], said.append, lambda: clock[0]
    )
    slow, fine = [phases(1.0), phases(1.0, data=0.9)], [phases(1.0), phases(1.0)]
    for ranks in [*[slow] * (POINTS - 1), fine, *[slow] * (POINTS - 1)]:
        stragglers.judge(ranks)
    assert said == []
    for seconds in (0.0, 10.0, 3500.0):
        clock[0] = seconds
        stragglers.judge(slow)
    (line,) = said
    assert line.startswith("warning: rank 1 on node-b has been the slowest for 3 log points")
    assert "1.88 times" in line and "above all data, 0.900 s a step instead of 0.010 s" in line
    clock[0] = 3700.0
    stragglers.judge(slow)
    assert len(said) == 2
