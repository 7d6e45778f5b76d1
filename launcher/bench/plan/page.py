"""The tables of `biroute bench plan`: predicted beside measured, computed anew from the JSON file. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from biroute.launcher.bench.plan.cases import CASES, Case
from biroute.launcher.plan.communication import ASSUMED_EXCHANGE, AXES, region_exchange, traffic
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.plan.memory import peak_memory
from biroute.launcher.plan.prediction import Plan

MIB = 1 << 20
# Method of torch's process groups -> kind of `Traffic`.
OPERATIONS = {
    "allreduce": "all_reduce", "send": "send", "broadcast": "send",
    "allgather": "gather", "_allgather_base": "gather", "all_gather_single": "gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_single": "reduce_scatter",
    "alltoall_base": "all_to_all", "all_to_all_single": "all_to_all",
}  # fmt: skip
Rows = list[list[str]]
Table = tuple[list[str], Rows]


def sent_by_axis(case: Case, ranks: list[dict[str, Any]], rank: int) -> dict[str, float]:
    """Return the bytes that a rank was counted to send in a step, as rings move them.

    Of region ranks it leaves out requests and the payload of routed layers, which depend on the routes: `payload`.
    """
    layout = case.work().layout
    size = {
        "tensor": layout.tensor,
        "region": layout.region,
        "pipeline": layout.pipe,
        "data": layout.data * layout.region,
    }
    first = rank < case.ranks // layout.pipe
    found: dict[str, float] = dict.fromkeys(AXES, 0.0)
    for axis, method, tensor, calls in ranks[rank]["calls"]:
        operation, n = OPERATIONS[method], 2 if axis == "pipeline" else size[axis]
        if operation == "all_to_all" or (method == "broadcast" and not first):
            continue  # counted below; and of the tied embedding only the first stage sends
        share = (n - 1) / n
        factor = {"all_reduce": 2 * share, "gather": share, "reduce_scatter": share}.get(operation, 1.0)
        found[axis] += factor * tensor * calls
    return found


def payload(ranks: list[dict[str, Any]]) -> float:
    """Return what region ranks received of routed and sliding-window layers, mean over the ranks."""
    kinds = ("keys", "queries", "results", "gradients")
    return sum(size for one in ranks for name, size in one["received"].items() if name.split()[1] in kinds) / len(
        ranks
    )


def predicted_bytes(case: Case, rank: int) -> dict[str, float]:
    """Return the same of the plan."""
    work = case.work()
    stage = rank * work.layout.pipe // case.ranks
    found: dict[str, float] = dict.fromkeys(AXES, 0.0)
    for one in traffic(work, stage):
        if one.operation != "all_to_all" and one.what != "neighbouring keys":
            found[one.axis] += one.sent_bytes
    return found


def bytes_table(answer: Mapping[str, Any]) -> Table:
    """Predicted and counted bytes by axis of each case with several ranks, of the rank that sends most."""
    rows: Rows = []
    for case in CASES:
        counted = answer["cases"].get(case.name, {}).get("counted")
        if counted is None or case.ranks == 1:
            continue
        rank = max(range(case.ranks), key=lambda one: sum(predicted_bytes(case, one).values()))
        mine, theirs = predicted_bytes(case, rank), sent_by_axis(case, counted, rank)
        for axis in AXES:
            if mine[axis] or theirs[axis]:
                rows.append(
                    [case.name, axis, f"{mine[axis]:,.0f}", f"{theirs[axis]:,.0f}", _equal(mine[axis], theirs[axis])]
                )
        if (received := payload(counted)) > 0:
            exchange = region_exchange(case.work(), 0, ASSUMED_EXCHANGE)
            if exchange.certain == exchange.bound:
                rows.append(
                    [
                        case.name,
                        "region, windows",
                        f"{exchange.bound:,.0f}",
                        f"{received:,.0f}",
                        _equal(exchange.bound, received),
                    ]
                )
            else:
                within = "within the bound" if received <= exchange.bound else "above the bound"
                rows.append(
                    [case.name, "region, routes", f"at most {exchange.bound:,.0f}", f"{received:,.0f}", within]
                )
    return ["layout", "axis", "predicted", "counted", ""], rows


def _equal(predicted: float, counted: float) -> str:
    return "equal" if predicted == counted else f"{predicted / counted - 1:+.2%}" if counted else "not equal"


def memory_table(answer: Mapping[str, Any]) -> Table:
    """Predicted and measured peak of the rank that holds most."""
    rows: Rows = []
    for case in CASES:
        counted = answer["cases"].get(case.name, {}).get("counted")
        if counted is None:
            continue
        memory, _ = peak_memory(case.work(), ASSUMED_EXCHANGE)
        measured = max(one["peak_bytes"] for one in counted)
        parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:3]
        rows.append(
            [
                case.name, str(case.ranks), f"{measured / MIB:.0f}", f"{memory.total / MIB:.0f}",
                f"{memory.total / measured - 1:+.1%}", ", ".join(f"{name} {size / MIB:.0f}" for name, size in parts),
            ]
        )  # fmt: skip
    return ["layout", "ranks", "measured", "predicted", "error", "largest parts"], rows


def time_table(answer: Mapping[str, Any]) -> Table:
    """Predicted and measured time of a step, with the largest parts of the prediction."""
    rows: Rows = []
    for case in CASES:
        timed = answer["cases"].get(case.name, {}).get("timed")
        if timed is None:
            continue
        step, measured = plan_of(case, answer).step, measured_seconds(timed)
        parts = sorted(step.parts().items(), key=lambda part: -part[1])[:3]
        low, high = (pick(pick(one["step_seconds"]) for one in timed) for pick in (min, max))
        rows.append(
            [
                case.name, str(case.ranks), f"{measured:.3f}", f"{low:.3f} - {high:.3f}", f"{step.total:.3f}",
                f"{step.total / measured - 1:+.0%}",
                ", ".join(f"{name} {seconds / step.total:.0%}" for name, seconds in parts),
            ]
        )  # fmt: skip
    return ["layout", "ranks", "measured", "fastest - slowest", "predicted", "error", "largest parts"], rows


def measured_seconds(timed: list[dict[str, Any]]) -> float:
    """Return the median step of the slowest rank."""
    return float(max(one["median_seconds"] for one in timed))


def plan_of(case: Case, answer: Mapping[str, Any]) -> Plan:
    """Return the plan of a case with the profile that was measured beside it."""
    return Plan(case.work(), HardwareProfile.model_validate(answer["hardware"][str(case.ranks)]))


def time_errors(answer: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative error of each timed case."""
    return {
        case.name: plan_of(case, answer).step.total / measured_seconds(answer["cases"][case.name]["timed"]) - 1
        for case in CASES
        if "timed" in answer["cases"].get(case.name, {})
    }


def model_table() -> Table:
    """What each case trains."""
    rows: Rows = []
    for case in CASES:
        config, work = case.config(), case.work()
        model, attention = config.model, config.model.attention
        kinds = sorted({model.attention_kind(layer) for layer in range(model.num_layers)})
        routes = f"L {attention.region_size}, k {attention.topk}" if kinds != ["dense"] else ""
        routes += f", Lq {attention.query_block_size}" if "bi_level" in kinds else ""
        rows.append(
            [
                case.name, str(work.layout), f"C {model.hidden_size}, {model.num_layers} layers, H {model.num_heads}",
                f"{model.sequence_length:,}", f"{work.microbatches} x {config.train.microbatch_size}",
                ", ".join(kinds) + (f" ({routes})" if routes else ""),
            ]
        )  # fmt: skip
    return ["layout", "ranks by axis", "model", "S", "microbatches", "attention"], rows
