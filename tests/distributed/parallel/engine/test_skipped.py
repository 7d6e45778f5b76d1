"""A step whose gradient is not finite changes nothing, in every layout, and a resume after it is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import merge, plain_torch_run, shards_of, small_config, start_engine, train

from biroute.configs.errors import DivergedError
from biroute.model.block import Block
from biroute.parallel.checkpoint.load import load_checkpoint
from biroute.parallel.checkpoint.meta import TrainingProgress
from biroute.parallel.checkpoint.save import save_checkpoint
from biroute.parallel.engine.engine import Engine

Ranks = Callable[[int], WorkerPool]
ABOUT = {"model": {"kind": "test"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"data": 2, "zero_stage": 0},
    "ZeRO 1": {"data": 2, "zero_stage": 1},
    "ZeRO 2": {"data": 2, "zero_stage": 2},
    "ZeRO 3": {"data": 2, "zero_stage": 3},
    "tensor, ZeRO 0": {"tensor": 2, "zero_stage": 0},
    "tensor, ZeRO 1": {"tensor": 2, "zero_stage": 1},
    "pipeline, ZeRO 0": {"pipeline": 2, "zero_stage": 0},
    "pipeline, ZeRO 1": {"pipeline": 2, "zero_stage": 1},
    "region, ZeRO 0": {"region": 2, "zero_stage": 0},
    "region, ZeRO 2": {"region": 2, "zero_stage": 2},
}


def poison(engine: Engine) -> dict[str, float]:
    """Let the gradient of layer 0's hidden states, and of all before them, be multiplied by what the answer holds."""
    factor = {"factor": 1.0}
    block = next((module for module in engine.deepspeed.module.modules() if isinstance(module, Block)), None)
    if block is not None and engine.mesh.at.pipe == 0:
        block.register_forward_hook(
            lambda _, __, hidden: hidden * factor["factor"] - (hidden * (factor["factor"] - 1)).detach()
        )
    return factor


def skipping_job(parallel: dict[str, Any], precision: str, folder: Path) -> tuple[list[Any], Any, Any]:
    """Reports of steps 1 ... 4, of which the second is poisoned; weights after step 4, straight and resumed."""
    config = small_config(parallel=parallel, train={"precision": precision})
    engine = start_engine(config)
    factor, reports = poison(engine), []
    for step in (1, 2, 3):
        factor["factor"] = math.inf if step == 2 else 1.0
        reports += train(engine, [step])
    save_checkpoint(engine, folder, TrainingProgress(step=3, skipped_steps=1, sequences=0), ABOUT, keep=1)
    reports += train(engine, [4])
    straight = shards_of(engine, {name: engine.state.read(p) for name, p in engine.named_parameters()})
    resumed = start_engine(config)
    assert load_checkpoint(resumed, folder, ABOUT, print) is not None
    train(resumed, [4])
    again = shards_of(resumed, {name: resumed.state.read(p) for name, p in resumed.named_parameters()})
    return reports, straight, again


def torch_job() -> Any:
    return plain_torch_run(small_config(), [1, 3, 4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_without_a_finite_gradient_changes_nothing(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2).run(skipping_job, LAYOUTS[layout], "fp32", tmp_path)
    ((expected_reports, expected),) = ranks(1).run(torch_job)
    for reports, _, _ in answers:
        assert [math.isnan(norm) for _, norm in reports] == [False, True, False, False]
        torch.testing.assert_close(
            torch.tensor([reports[0], *reports[2:]]), torch.tensor(expected_reports), rtol=1e-5, atol=0
        )
    straight, again = merge([one for _, one, _ in answers]), merge([one for _, _, one in answers])
    for name, values in expected.items():
        assert (straight[name]["weight"] - values["weight"]).norm() / values["weight"].norm() < 1e-5, name
        for kind, value in straight[name].items():
            assert torch.equal(value, again[name][kind]), f"{kind} of {name}"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_skips_as_well(zero_stage: int, ranks: Ranks, tmp_path: Path) -> None:
    for reports, straight, again in ranks(2).run(
        skipping_job, {"data": 2, "zero_stage": zero_stage}, "bf16", tmp_path
    ):
        assert [math.isnan(norm) for _, norm in reports] == [False, True, False, False]
        for name, (_, _, values) in straight.items():
            assert all(torch.equal(value, again[name][2][kind]) for kind, value in values.items()), name
            assert all(value.isfinite().all() for value in values.values()), name


def spike_job(parallel: dict[str, Any], precision: str, folder: Path) -> tuple[list[Any], Any, Any]:
    """As `skipping_job`: of steps 1 ... 6 the fifth is a spike; the checkpoint holds the norms before it."""
    optim = {"spike_deviations": 6.0, "spike_window": 3}
    config = small_config(parallel=parallel, optim=optim, train={"precision": precision})
    engine = start_engine(config)
    factor = poison(engine)
    reports = train(engine, range(1, 5))
    norms = tuple(engine.spike_guard.norms)
    save_checkpoint(engine, folder, TrainingProgress(step=4, gradient_norms=norms, sequences=0), ABOUT, keep=1)
    resumed = start_engine(config)
    progress = load_checkpoint(resumed, folder, ABOUT, print)
    assert progress is not None
    resumed.spike_guard.resume(progress.gradient_norms)
    ends = []
    for one, its_factor in ((engine, factor), (resumed, poison(resumed))):
        its_factor["factor"] = 1000.0
        reports += train(one, [5])
        its_factor["factor"] = 1.0
        reports += train(one, [6])
        ends.append(shards_of(one, {name: one.state.read(p) for name, p in one.named_parameters()}))
    return reports, *ends


def torch_without_spike_job() -> Any:
    return plain_torch_run(small_config(), [1, 2, 3, 4, 6])


@pytest.mark.parametrize("layout", ["ZeRO 0", "ZeRO 3", "pipeline, ZeRO 1"])
def test_a_spike_changes_nothing(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2).run(spike_job, LAYOUTS[layout], "fp32", tmp_path)
    ((expected_reports, expected),) = ranks(1).run(torch_without_spike_job)
    for reports, _, _ in answers:
        norms = [norm for _, norm in reports]
        assert norms[4] == norms[6] > 10 * max(norms[:4]), "no spike, or not the same after the resume"
        kept = torch.tensor([*reports[:4], reports[5]])
        torch.testing.assert_close(kept, torch.tensor(expected_reports), rtol=1e-5, atol=0)
    straight, again = merge([one for _, one, _ in answers]), merge([one for _, _, one in answers])
    for name, values in expected.items():
        assert (straight[name]["weight"] - values["weight"]).norm() / values["weight"].norm() < 1e-5, name
        for kind, value in straight[name].items():
            assert torch.equal(value, again[name][kind]), f"{kind} of {name}"


def bad_weights_job(folder: Path) -> str:
    engine = start_engine(small_config(parallel={"data": 2, "zero_stage": 1}))
    train(engine, [1])
    save_checkpoint(engine, folder, TrainingProgress(step=1, sequences=0), ABOUT, keep=1)
    _, parameter = next(iter(engine.named_parameters()))
    state = engine.state.read(parameter)
    state["weight"].view(-1)[7] = math.nan
    engine.state.write(parameter, state)
    try:
        save_checkpoint(engine, folder, TrainingProgress(step=2, sequences=0), ABOUT, keep=1)
    except DivergedError as error:
        return str(error)
    return "saved"


def test_weights_that_are_not_finite_take_no_place_of_a_good_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(2).run(bad_weights_job, tmp_path):
        assert said.startswith("weight of embedding.weight is not finite, so no checkpoint is written"), said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
