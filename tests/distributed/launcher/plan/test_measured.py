"""Predictions beside what real gloo ranks send, hold and keep: the same numbers, from sizes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.pool import WorkerPool
from helpers.training import microbatches, small_config, start_engine

from biroute.configs.layout import resolve_layout
from biroute.launcher.bench.plan.collectives import Calls, counted_collectives
from biroute.launcher.plan.communication import region_exchange, traffic
from biroute.launcher.plan.memory import memory_of_stage
from biroute.launcher.plan.workload import Execution, Workload

OPERATIONS = {
    "allreduce": "all_reduce", "send": "send", "broadcast": "send",
    "_allgather_base": "gather", "all_gather_single": "gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_single": "reduce_scatter",
}  # fmt: skip
Sections = dict[str, dict[str, Any]]


def work_of(sections: Sections, world_size: int) -> Workload:
    config = small_config(**sections)
    return Workload(config, resolve_layout(config, world_size), Execution.of(config, cpu=True))


def second_step(sections: Sections) -> tuple[Calls, int, dict[str, dict[str, int]]]:
    """This rank's calls in a step after the first, its parameters, and the bytes it received of region ranks."""
    engine = start_engine(small_config(**sections))
    engine.train_step(microbatches(engine.config, engine.mesh, 1), 1e-3)
    if engine.traffic is not None:
        engine.traffic.clear()
    with counted_collectives() as calls:
        engine.train_step(microbatches(engine.config, engine.mesh, 2), 1e-3)
    received: dict[str, dict[str, int]] = {}
    if engine.traffic is not None:
        for (layer, kind), sizes in engine.traffic.received.items():
            received.setdefault(str(layer), {})[kind] = int(sizes.sum())
    return calls, sum(p.numel() for _, p in engine.named_parameters()), received


def counted(calls: Calls) -> Counter[tuple[str, int]]:
    """(operation, bytes of the tensor) -> calls between ranks, without scalars."""
    found: Counter[tuple[str, int]] = Counter()
    for (ranks, name, size), number in calls.items():
        if len(ranks) > 1 and size > 8:
            found[OPERATIONS[name], size] += number
    return found


LAYOUTS: dict[str, Sections] = {
    "tensor ranks": {"parallel": {"tensor": 2}, "model": {"qk_norm": True}},
    "sequence parallel": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "recomputed, sequence parallel": {
        "parallel": {"tensor": 2, "sequence_parallel": True}, "train": {"activation_checkpointing": True},
    },
    "bf16 pipeline": {"parallel": {"pipeline": 2}, "train": {"precision": "bf16"}},
    "no ZeRO": {"parallel": {"zero_stage": 0}},
    "ZeRO 1": {"parallel": {"zero_stage": 1}, "train": {"precision": "bf16"}},
    "ZeRO 2": {"parallel": {"zero_stage": 2}},
    # One matrix of each block is large enough to be gathered for each microbatch.
    "ZeRO 3": {"parallel": {"zero_stage": 3}, "model": {"hidden_size": 128, "ffn_hidden_size": 512}},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_sends_what_is_predicted(name: str, ranks: Callable[[int], WorkerPool]) -> None:
    work = work_of(LAYOUTS[name], 2)
    for rank, (calls, parameters, _) in enumerate(ranks(2).run(second_step, LAYOUTS[name])):
        stage = rank if work.layout.pipe > 1 else 0
        if work.layout.zero_stage < 3:  # there a parameter shows the elements that are gathered
            assert parameters == work.parameters_of_stage(stage)
        predicted: Counter[tuple[str, float]] = Counter()
        for one in traffic(work, stage):
            predicted[one.operation, one.tensor_bytes] += one.calls  # type: ignore[assignment]
        measured: Counter[Any] = counted(calls)
        if work.layout.pipe > 1:
            # The tied embedding is broadcast: both stages call it, only the first one sends.
            measured["send", work.embedding * work.element_size] *= stage == 0
        if work.data_ranks > 1 and work.layout.zero_stage:
            # Weights that decay and those that do not are gathered apart, each padded to the ranks.
            assert gathered(measured) == pytest.approx(gathered(predicted), rel=1e-3)
        assert +measured == predicted


def test_four_ranks_of_three_axes_send_what_is_predicted(ranks: Callable[[int], WorkerPool]) -> None:
    """Two tensor ranks, two stages; then two region ranks and two data ranks: bytes of all axes together."""
    for parallel in ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"tensor": 2, "data": 2}):
        sections: Sections = {"parallel": parallel, "train": {"precision": "bf16"}}
        work = work_of(sections, 4)
        for rank, (calls, parameters, _) in enumerate(ranks(4).run(second_step, sections)):
            stage = rank // 2 if work.layout.pipe > 1 else 0
            assert parameters == work.parameters_of_stage(stage)
            measured: Counter[Any] = counted(calls)
            predicted: Counter[Any] = Counter()
            for one in traffic(work, stage):
                predicted[one.operation, one.tensor_bytes] += one.calls  # type: ignore[assignment]
            if work.layout.pipe > 1:
                measured["send", work.embedding / work.layout.tensor * work.element_size] *= stage == 0
            assert gathered(measured) == pytest.approx(gathered(predicted), rel=1e-3)
            assert +measured == predicted


def gathered(calls: Counter[Any]) -> float:
    """Take the gathers out of `calls` and return their bytes."""
    gathers = [call for call in calls if call[0] == "gather"]
    return sum(size * calls.pop((name, size)) for name, size in gathers)


def test_region_ranks_exchange_what_is_predicted(ranks: Callable[[int], WorkerPool]) -> None:
    """Descriptors, neighbouring keys, gathered keys and values; and, where all regions are routed, the bound."""
    sections: Sections = {"parallel": {"region": 2}, "model": {"attention": {"region_size": 4, "topk": 8}}}
    work = work_of(sections, 2)
    received = [answer[2] for answer in ranks(2).run(second_step, sections)]

    def mean(*kinds: str, layers: str = "0123") -> float:
        return (
            sum(
                sizes.get(kind, 0) for one in received for layer in layers for sizes in [one[layer]] for kind in kinds
            )
            / 2
        )

    predicted = {one.what: one.sent_bytes for one in traffic(work, 0)}
    assert mean("descriptors") == predicted["descriptors"]
    assert mean("neighbours") == predicted["neighbouring keys"]
    assert mean("gathered") == predicted["keys and values of dense layers"] + predicted["their gradients"]
    payload = mean("keys", "queries", "results", "gradients")
    exchange = region_exchange(work, 0, 1.0)
    assert 0.9 * exchange.bound < payload <= exchange.bound


def test_a_window_exchanges_exactly_what_is_predicted(ranks: Callable[[int], WorkerPool]) -> None:
    attention = {"kind": "sliding_window", "region_size": 4, "topk": 3}
    sections: Sections = {
        "parallel": {"region": 2}, "model": {"attention": attention, "dense_layers": []},
        "train": {"precision": "bf16", "activation_checkpointing": True},
    }  # fmt: skip
    received = [answer[2] for answer in ranks(2).run(second_step, sections)]
    payload = sum(one[layer][kind] for one in received for layer in one for kind in ("keys", "gradients")) / 2
    assert payload == region_exchange(work_of(sections, 2), 0, 0.4).certain


def states(sections: Sections) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer that DeepSpeed holds, as far as they stay after a step."""
    engine = start_engine(small_config(**sections))
    engine.train_step(microbatches(engine.config, engine.mesh, 1), 1e-3)
    optimizer, module = engine.deepspeed.optimizer, engine.deepspeed.module
    base = getattr(optimizer, "optimizer", optimizer)
    moments = sum(x.nbytes for state in base.state.values() for x in state.values() if x.dim())
    masters = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    master = sum(x.nbytes for name in masters for x in getattr(optimizer, name, []))
    zero_3 = engine.config.parallel.zero_stage == 3
    weights = sum((p.ds_tensor if zero_3 else p).nbytes for p in module.parameters())
    gradients = getattr(optimizer, "fp32_groups_gradients_flat", None) or []
    if zero_3:
        gradients = [optimizer.grad_partitions_flat_buffer]
    return {"weights": weights, "gradients": sum(x.nbytes for x in gradients), "optimizer": moments + master}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_deepspeed_holds_what_is_predicted(stage: int, precision: str, ranks: Callable[[int], WorkerPool]) -> None:
    sections: Sections = {"parallel": {"zero_stage": stage}, "train": {"precision": precision}}
    predicted = memory_of_stage(work_of(sections, 2), 0, 0.4)
    for held in ranks(2).run(states, sections):
        assert held["weights"] == pytest.approx(predicted.weights, rel=1e-3)  # shards are padded
        assert held["optimizer"] == pytest.approx(predicted.optimizer, rel=1e-3)
        if held["gradients"]:  # other stages free them after the step
            assert held["gradients"] == pytest.approx(predicted.gradients, rel=1e-3)


def kept_for_backward(sections: Sections) -> int:
    """Bytes that the model, without the loss, keeps of one microbatch."""
    engine = start_engine(small_config(**sections))
    assert dist.get_world_size() == 1
    inputs = microbatches(engine.config, engine.mesh, 1)[0].inputs
    weights = {parameter.untyped_storage().data_ptr() for _, parameter in engine.named_parameters()}
    kept: dict[int, torch.Tensor] = {}  # they stay alive, so that no place is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.deepspeed.module(inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_keep_what_is_predicted(precision: str, recompute: bool, ranks: Callable[[int], WorkerPool]) -> None:
    sections: Sections = {
        "model": {
            "hidden_size": 128, "num_layers": 2, "sequence_length": 512, "dense_layers": [],
            "sliding_window_layers": [], "attention": {"region_size": 16, "topk": 8, "descriptors_per_region": 1},
        },
        "train": {"precision": precision, "activation_checkpointing": recompute},
    }  # fmt: skip
    (kept,) = ranks(1).run(kept_for_backward, sections)
    work = work_of(sections, 1)
    memory = memory_of_stage(work, 0, 0.4)
    routes = 0 if recompute else memory.routing
    assert kept == pytest.approx(memory.activations + routes, rel=0.02)
