"""Memory, bytes and times of a small model, beside arithmetic that is done by hand here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from biroute.configs.layout import Layout
from biroute.configs.load import config_from_tree
from biroute.launcher.plan.communication import RegionExchange, Traffic, bytes_by_axis, region_exchange, traffic
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.plan.memory import memory_of_stage, microbatches_in_flight, peak_memory
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.step_time import RESOURCES, StepTime, binding_resource, step_time
from biroute.launcher.plan.workload import Execution, Workload
from biroute.model.flops import attended_pairs, forward_flops_per_sequence, parameter_count, train_flops_per_step

# One operation, byte of memory and byte between ranks take a second; the network is ten times slower.
UNIT = HardwareProfile(
    device="unit", peak_tflops_bf16=1e-12, peak_tflops_fp32=1e-12, memory_gib=1, memory_gb_per_second=1e-9,
    devices_per_node=4, intra_node_gb_per_second=1e-9, inter_node_gb_per_second=1e-10, efficiency=1,
)  # fmt: skip


def work(layout: Layout | None = None, **sections: dict[str, Any]) -> Workload:
    """C 8, 4 blocks, 2 heads of 4, F 16, V 320, S 32, dense; B 1, 8 sequences, bf16."""
    layout = layout or Layout(tensor=1, region=1, data=1, pipe=1, zero_stage=1)
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 8, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 16,
            "sequence_length": 32, "vocab_multiple": 64, "key_smear": False,
            "attention": {"kind": "dense", "region_size": 4, "topk": 3},
        },
        "data": {"tokenizer": {"vocab_size": 300}},
        "parallel": {
            "tensor": layout.tensor, "region": layout.region, "pipeline": layout.pipe,
            "zero_stage": layout.zero_stage,
        },
        "train": {"global_batch_size": 8, "microbatch_size": 1, "precision": "bf16"},
    }  # fmt: skip
    for section, fields in sections.items():
        tree[section] |= fields
    config = config_from_tree(tree, "test")
    return Workload(config, layout, Execution.of(config))


BLOCK = 4 * 8 * 8 + 3 * 8 * 16  # elements of a block's matrices


def test_parameters_of_the_stages_are_those_of_the_model() -> None:
    for tied in (True, False):
        one = work(model={"tied_embeddings": tied, "qk_norm": True, "key_smear": True})
        assert one.parameters_of_stage(0) == parameter_count(one.config)
        staged = replace(one, layout=Layout(1, 1, 1, 2, 1))
        twice = 320 * 8 if tied else 0  # both ends hold a tied embedding
        assert staged.parameters_of_stage(0) + staged.parameters_of_stage(1) == parameter_count(one.config) + twice


def test_stages_that_blocks_do_not_divide_have_more_in_the_middle() -> None:
    uneven = work(Layout(1, 1, 1, 4, 1), model={"num_layers": 14})
    assert uneven.layers_of_stage == [3, 4, 4, 3]


def test_operations_of_a_rank_are_those_of_the_model() -> None:
    one = work()
    config = one.config
    per_sequence = 4 * (one.linear_flops + one.attention_flops + one.routing_flops) + one.head_flops
    assert per_sequence == forward_flops_per_sequence(config)
    shared = replace(one, layout=Layout(2, 1, 2, 2, 1))
    ranks = 2 * (2 * (shared.linear_flops + shared.attention_flops)) + shared.head_flops
    assert 2 * ranks == forward_flops_per_sequence(config)  # two tensor ranks, two stages of two blocks


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 9])
def test_attended_pairs_by_counting(topk: int) -> None:
    config = work(model={"attention": {"region_size": 4, "topk": topk, "force_previous": topk > 1}}).config
    pairs = 0
    for query in range(32):
        earlier = min(topk - 1, query // 4)
        pairs += earlier * 4 + query % 4 + 1
    assert attended_pairs(config, 0) == pairs


def test_memory_by_hand() -> None:
    one = work()
    memory = memory_of_stage(one, 0, 0.4)
    count = 4 * (BLOCK + 16) + 320 * 8 + 8
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 12 * count)
    # A token: inputs (fp32) and outputs of norms; q, k, v, rotated q and k, output and its copy; log-sum-exps; MLP.
    block = 2 * (4 + 2) * 8 + 2 * 7 * 8 + 4 * 2 + 2 * 3 * 16
    assert memory.activations == 32 * (4 * block + 6 * 8)
    assert memory.logits == 32 * 320 * 2  # bf16, on a GPU
    assert memory.buffers == 4 * count
    assert memory.routing == memory.exchange == memory.recomputed == 0
    assert memory.total == pytest.approx(sum(memory.parts().values()))


def test_recomputation_keeps_inputs_and_one_block() -> None:
    plain, again = (memory_of_stage(work(train={"activation_checkpointing": flag}), 0, 0.4) for flag in (False, True))
    kept = 32 * 2 * 8
    block = (plain.activations - 32 * 6 * 8) / 4
    assert again.activations == 4 * kept + 32 * 6 * 8
    assert again.recomputed == block - kept


@pytest.mark.parametrize(("stage", "divided"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_zero_divides_states_among_data_and_region_ranks(stage: int, divided: tuple[int, int, int]) -> None:
    precision = {"precision": "fp32"}
    whole = memory_of_stage(work(Layout(1, 1, 1, 1, stage), train=precision), 0, 0.4)
    shared = memory_of_stage(work(Layout(1, 2, 2, 1, stage), train=precision), 0, 0.4)
    states = [
        (whole.weights, shared.weights),
        (whole.gradients, shared.gradients),
        (whole.optimizer, shared.optimizer),
    ]
    assert tuple(all_of / part for all_of, part in states) == divided


def test_microbatches_in_flight_of_1f1b() -> None:
    staged = work(Layout(1, 1, 1, 4, 1))
    assert [microbatches_in_flight(staged, stage) for stage in range(4)] == [4, 3, 2, 1]
    few = work(Layout(1, 1, 4, 4, 1))  # two microbatches
    assert [microbatches_in_flight(few, stage) for stage in range(4)] == [2, 2, 2, 1]
    parts = replace(staged, execution=replace(staged.execution, virtual_stages=2))
    assert microbatches_in_flight(parts, 0) == 4 + 3 / 2  # Korthikanti et al. 2022, section 4.2.3
    deep = work(Layout(1, 1, 1, 4, 1), model={"num_layers": 400})
    assert peak_memory(deep, 0.4) == (memory_of_stage(deep, 0, 0.4), 0)
    wordy = work(Layout(1, 1, 1, 4, 1), data={"tokenizer": {"vocab_size": 3000}})
    assert peak_memory(wordy, 0.4)[1] == 3  # with few blocks and many words, the logits of the last stage are more


@pytest.mark.parametrize(
    ("operation", "sent", "messages"),
    [("all_reduce", 1.5 * 80, 6), ("gather", 0.75 * 80, 3), ("reduce_scatter", 0.75 * 80, 3), ("send", 80, 1)],
)
def test_what_a_ring_of_four_sends(operation: Any, sent: float, messages: float) -> None:
    one = Traffic("data", "x", operation, tensor_bytes=8, calls=10, ranks=4)
    assert (one.sent_bytes, one.messages) == (sent, 10 * messages)


def test_bytes_by_axis_by_hand() -> None:
    one = work(Layout(tensor=2, region=1, data=2, pipe=2, zero_stage=1))
    hidden = 32 * 8 * 2
    by_axis = bytes_by_axis(traffic(one, 1))
    # Four microbatches: four sums a block, one of the head's gradient, three of the loss. Two ranks send the bytes of
    # an all-reduce once.
    assert by_axis["tensor"] == 4 * ((4 * 2 + 1) * hidden + 3 * 4 * 32)
    # Gradients to the stage before; half of the tied embedding's gradient in fp32.
    assert by_axis["pipeline"] == 4 * hidden + 320 * 8 / 2 * 4
    count = 2 * (BLOCK / 2 + 16) + 320 * 8 / 2 + 8
    assert by_axis["data"] == count * 4 + count * 2 / 2
    assert by_axis["region"] == 0


def test_the_exchange_of_regions_by_hand() -> None:
    """Windows of three regions: the second of two ranks fetches two regions for each head, forward and backward."""
    one = work(Layout(1, 2, 1, 1, 1), model={"attention": {"kind": "sliding_window", "region_size": 4, "topk": 3}})
    forward = 2 * 2 * (2 * 4 * 4 * 2)  # heads, regions, keys and values of a region
    expected = 8 * 4 * forward * (1 + 2) / 2  # microbatches, blocks; gradients in fp32; mean over two ranks
    exchange = region_exchange(one, 0, 0.4)
    assert exchange.certain == exchange.bound == exchange.expected == expected
    routed = work(Layout(1, 2, 1, 1, 1), model={"attention": {"kind": "bi_level", "region_size": 4, "topk": 3}})
    exchange = region_exchange(routed, 0, 0.4)
    assert exchange.certain == 0
    assert exchange.expected == 0.4 * exchange.bound > 0
    assert RegionExchange(bound=10, certain=4, causal_fetch=20, fraction=0.5).expected == 7


def test_a_step_by_hand() -> None:
    one = work()
    step = step_time(one, UNIT, 0.4)
    assert step.attention == 8 * 4 * 3 * one.attention_flops
    # Logits are read twice, and their gradient is written once.
    assert step.head == 8 * (3 * one.head_flops + 6 * 32 * 320)
    assert step.optimizer == (28 + 2) * parameter_count(one.config)
    assert step.data == step.tensor == step.region == step.pipeline == step.bubble == step.recomputation == 0
    # Forward of a token's element-wise operations: two norms, two residuals; rotary; SwiGLU.
    assert step.elementwise == 8 * 4 * 3 * 32 * (8 * (2 * 4 + 2 * 6) + 2 * (2 * 16 + 3 * 16))
    fast = UNIT.model_copy(update={"memory_gb_per_second": 1.0})
    assert step_time(one, fast, 0.4).matmul == 8 * 4 * 3 * one.linear_flops
    half = fast.model_copy(update={"efficiency": 0.5})
    assert step_time(one, half, 0.4).matmul == 2 * 8 * 4 * 3 * one.linear_flops


def test_the_bubble_is_the_share_of_narayanan() -> None:
    """(p - 1) / m of the busy time, divided by the virtual stages; without a head, since only one stage has it."""
    free = UNIT.model_copy(update={"memory_gb_per_second": 1e9, "intra_node_gb_per_second": 1e9})
    staged = work(Layout(1, 1, 1, 4, 1), model={"num_layers": 400})
    step = step_time(staged, free, 0.4)
    busy = step.matmul + step.attention
    assert step.bubble == pytest.approx(3 / 8 * (busy + step.head / 4), rel=1e-3)
    parts = replace(staged, execution=replace(staged.execution, virtual_stages=5))
    assert step_time(parts, free, 0.4).bubble == pytest.approx(step.bubble / 5, rel=1e-3)


def test_what_is_hidden_counts_where_it_lasts_longer() -> None:
    one = work(Layout(1, 1, 8, 1, 1))
    hidden = replace(one, execution=replace(one.execution, hidden=frozenset({"data"})))
    slow = UNIT.model_copy(update={"inter_node_gb_per_second": 1e-11})
    shown, beside = (step_time(each, slow, 0.4) for each in (one, hidden))
    # Eight ranks on two nodes: each has four network cards of a hundredth.
    assert shown.data == pytest.approx(bytes_by_axis(traffic(one, 0))["data"] / 0.04)
    assert beside.data == pytest.approx(shown.data - beside.matmul - beside.attention - beside.elementwise)
    assert step_time(hidden, UNIT, 0.4).data == 0
    layout = Layout(1, 1, 8, 1, zero_stage=2)
    after, along = (work(layout, parallel={"overlap_grad_reduce": overlap}) for overlap in (False, True))
    assert after.execution.hidden < along.execution.hidden == {"region", "data"}
    buffers = [memory_of_stage(each, 0, 0.4).buffers for each in (after, along)]
    assert buffers[1] == 2 * buffers[0], "one bucket fills while the other is summed"


def test_latency_counts_for_each_message() -> None:
    one = work(Layout(2, 1, 1, 1, 1))
    late = UNIT.model_copy(update={"intra_node_latency_us": 1e6})
    calls = 8 * (4 * 4 + 2 + 3)
    assert step_time(one, late, 0.4).tensor - step_time(one, UNIT, 0.4).tensor == 2 * calls


def test_every_part_of_a_step_waits_for_one_resource() -> None:
    parts = [part for of in RESOURCES.values() for part in of]
    assert sorted(parts) == sorted(StepTime.__dataclass_fields__)
    step = StepTime(**{**dict.fromkeys(parts, 1.0), "data": 90.0})
    assert binding_resource(step) == ("links of the data axis", 90 / step.total)


def test_rates_and_costs_follow_from_the_step() -> None:
    one = work(Layout(1, 1, 8, 1, 1))
    plan = Plan(one, UNIT.model_copy(update={"price_per_device_hour": 2.0}))
    assert plan.tokens_per_second == 8 * 32 / plan.step.total
    assert plan.mfu == train_flops_per_step(one.config) / plan.step.total / 8
    assert plan.device_hours == pytest.approx(8 * 1000 * plan.step.total / 3600)
    assert plan.cost == 2 * plan.device_hours
    assert Plan(one, UNIT).cost is None
