"""Learning-rate schedules against torch's own schedulers and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from biroute.configs.schema import OptimConfig
from biroute.launcher.train.schedule import learning_rate

PEAK, LOWEST, WARMUP, STEPS = 1e-2, 1e-3, 5, 25


def rates(**fields: object) -> list[float]:
    optim = OptimConfig.model_validate(
        {"learning_rate": PEAK, "min_learning_rate": LOWEST, "warmup_steps": WARMUP} | fields
    )
    return [learning_rate(optim, step, STEPS) for step in range(1, STEPS + 1)]


def rates_of_torch(*schedulers: tuple[type[LRScheduler], dict[str, float], int]) -> list[float]:
    """The rates of steps 1 ... STEPS under schedulers that follow each other, each with its number of steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    made = [kind(optimizer, **arguments) for kind, arguments, _ in schedulers]
    ends = torch.tensor([steps for _, _, steps in schedulers]).cumsum(0).tolist()
    chain = SequentialLR(optimizer, made, milestones=ends[:-1])
    found = []
    for _ in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()
    return found[1:]


def test_cosine_is_torchs() -> None:
    warmup = (LinearLR, {"start_factor": 1e-9, "total_iters": WARMUP}, WARMUP)
    decay = (CosineAnnealingLR, {"T_max": STEPS - WARMUP, "eta_min": LOWEST}, STEPS - WARMUP)
    assert rates() == pytest.approx(rates_of_torch(warmup, decay), rel=1e-6)


def test_cosine_by_hand() -> None:
    found = rates()
    assert found[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])
    middle = WARMUP + (STEPS - WARMUP) // 2
    assert found[middle - 1] == pytest.approx((PEAK + LOWEST) / 2)
    assert found[-1] == pytest.approx(LOWEST)
    quarter = WARMUP + (STEPS - WARMUP) // 4
    assert found[quarter - 1] == pytest.approx(LOWEST + (PEAK - LOWEST) * (1 + math.cos(math.pi / 4)) / 2)


def test_warmup_then_constant_then_linear_decay() -> None:
    found = rates(schedule="wsd", decay_steps=10)
    assert found[WARMUP - 1 : STEPS - 10] == pytest.approx([PEAK] * (STEPS - 10 - WARMUP + 1))
    assert found[STEPS - 10 :] == pytest.approx([PEAK + (LOWEST - PEAK) * n / 10 for n in range(1, 11)])


def test_constant_after_the_warmup() -> None:
    assert rates(schedule="constant")[WARMUP - 1 :] == pytest.approx([PEAK] * (STEPS - WARMUP + 1))


def test_no_warmup() -> None:
    assert rates(schedule="constant", warmup_steps=0) == pytest.approx([PEAK] * STEPS)
