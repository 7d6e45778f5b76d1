"""Whole weights from checkpoints of several layouts, read without an engine: the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, tokens_of_step, train
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.configs.layout import resolve_layout
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.checkpoint.meta import TrainingProgress
from biroute.parallel.checkpoint.save import save_checkpoint
from biroute.parallel.checkpoint.weights import load_weights, newest_checkpoint, read_weights
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]


def train_and_save_job(parallel: dict[str, Any], model: dict[str, Any], folder: Path) -> float:
    config = small_config(parallel=parallel, model=model)
    engine = start_engine(config)
    train(engine, range(1, 3))
    save_checkpoint(engine, folder, TrainingProgress(step=2, sequences=16), {"model": {}}, 1)
    inputs, labels = (engine.mesh.own_tokens(x) for x in tokens_of_step(config, 9))
    part = slice(engine.mesh.at.data, None, engine.mesh.layout.data)
    from biroute.parallel.engine.engine import Microbatch

    batches = [Microbatch(inputs[part][:2], labels[part][:2])] * engine.microbatches_per_evaluation
    return engine.evaluate(batches)


def loss_of_weights_job(model: dict[str, Any], path: Path, data: int) -> float:
    config = small_config(model=model)
    module = LayerSequence(plan_layers(config, build_mesh(resolve_layout(config, 1)).groups))
    load_weights(module, dict(read_weights(newest_checkpoint(path), verify=True)))
    inputs, labels = tokens_of_step(config, 9)
    chosen = torch.cat([torch.arange(rank, 8, data)[:2] for rank in range(data)])
    with torch.no_grad():
        logits = module(inputs[chosen]).transpose(0, 1)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten()))


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        ({"data": 1}, {}),
        ({"data": 2, "zero_stage": 3}, {"tied_embeddings": False}),
        ({"tensor": 2, "pipeline": 2, "data": 1}, {"qk_norm": True}),
        ({"region": 2, "tensor": 2, "data": 1}, {}),
    ],
    ids=str,
)
def test_whole_weights_are_the_model(
    ranks: Ranks, tmp_path: Path, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    """The held-out loss of the engine that trained, and of the weights in one process under torch's own loss."""
    data = parallel.get("data", 1)
    world = data * parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("region", 1)
    losses = ranks(world).run(train_and_save_job, parallel, model, tmp_path)
    (found,) = ranks(1).run(loss_of_weights_job, model, tmp_path, data)
    assert losses == pytest.approx([found] * world, rel=1e-5)


def test_damage_and_other_models_are_named(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(train_and_save_job, {"data": 1}, {}, tmp_path)
    weights: dict[str, Tensor] = dict(read_weights(tmp_path / "step-00000002"))
    module = torch.nn.Module()
    for wrong, message in (
        ({name: w for name, w in weights.items() if name != "norm.weight"}, r"1 missing \['norm.weight'\]"),
        (weights | {"extra": torch.zeros(1)}, r"unknown \['extra'\]"),
        (weights | {"norm.weight": torch.zeros(3)}, r"norm.weight is \(3,\) instead of \(32,\)"),
    ):
        module.named_weights = lambda: ((n, torch.nn.Parameter(w)) for n, w in weights.items())
        with pytest.raises(UsageError, match=message):
            load_weights(module, wrong)
    (file,) = (tmp_path / "step-00000002").glob("*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"damaged checkpoint .*checksum differs"):
        dict(read_weights(tmp_path / "step-00000002", verify=True))
    file.unlink()
    with pytest.raises(UsageError, match="damaged checkpoint"):
        dict(read_weights(tmp_path / "step-00000002"))
    with pytest.raises(UsageError, match="holds no readable checkpoint"):
        newest_checkpoint(tmp_path / "nothing")
