"""Places of a thousand ranks: Megatron-core's groups, DeepSpeed's topology and ours agree, or one line says where."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.layout import Layout
from biroute.parallel.mesh.rank_order import check_rank_order, coordinates_of

SIMULATION = Path(__file__).parents[3] / "helpers" / "simulated_ranks.py"
AXES = ("tensor", "region", "data", "pipe")


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 8, "region": 16, "data": 4, "pipe": 2},
        pytest.param({"tensor": 1, "region": 256, "data": 4, "pipe": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_simulated_ranks(sizes: dict[str, int]) -> None:
    done = subprocess.run(
        [sys.executable, str(SIMULATION), json.dumps(sizes)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    layout = Layout(**sizes, zero_stage=1)
    assert layout.world_size == math.prod(sizes.values()) == 1024
    places = {rank: coordinates_of(layout, rank) for rank in range(layout.world_size)}
    for name, answer in found["ranks"].items():
        here = places[int(name)]
        assert answer["at"] == vars(here)
        for group, members in answer["groups"].items():
            free = {"data", "region"} if group == "data and region" else {group}
            fixed = [axis for axis in AXES if axis not in free]
            same = [r for r, at in places.items() if all(getattr(at, a) == getattr(here, a) for a in fixed)]
            assert members == same, (name, group)
    plans = found["traffic"]
    assert plans["asked"] == plans["served"] > 0
    assert 0 < plans["bytes"] < plans["causal_fetch"]


@pytest.mark.parametrize("sizes", product((1, 2), (1, 4), (1, 3), (1, 2)))
def test_installed_libraries_agree(sizes: tuple[int, ...]) -> None:
    check_rank_order(Layout(*sizes, zero_stage=1))


@pytest.mark.parametrize(
    ("order", "axes", "library"),
    [
        ("tp-pp-cp-ep-dp", ("pipe", "data", "model"), "megatron-core"),
        ("cp-tp-ep-dp-pp", ("pipe", "data", "model"), "megatron-core"),
        ("tp-cp-ep-dp-pp", ("data", "pipe", "model"), "deepspeed"),
    ],
)
def test_another_order_is_one_line(order: str, axes: tuple[str, ...], library: str) -> None:
    layout = Layout(tensor=2, region=2, data=2, pipe=2, zero_stage=1)
    with pytest.raises(UsageError) as error:
        check_rank_order(layout, order, axes)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(layout), library, "puts rank", "install the versions"):
        assert part in text
