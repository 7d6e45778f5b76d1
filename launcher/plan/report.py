"""A plan as a table for people and as plain values for programs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from biroute.launcher.plan.communication import AXES
from biroute.launcher.plan.hardware import GIB
from biroute.launcher.plan.prediction import Plan
from biroute.launcher.plan.search import Found, remedy
from biroute.launcher.plan.step_time import binding_resource
from biroute.launcher.plan.workload import Workload
from biroute.launcher.track.run_summary import PREDICTED

Row = list[str]
Cell = Callable[..., str]


def assumptions(plan: Plan) -> list[str]:
    """Return what the numbers of a plan stand on and no input says."""
    hardware, work, config = plan.hardware, plan.work, plan.config
    found = [
        f"matrix products and attention reach {hardware.efficiency:g} of the device's peak, one constant for all "
        "shapes; memory and links reach the profile's rates",
        f"no computation hides what these axes send: {_axes(work, hidden=False)}; beside computation run: "
        f"{_axes(work, hidden=True)}",
        "no time to launch kernels: small models are slower",
        "memory without the CUDA context, NCCL's buffers and fragmentation; peaks of all parts meet",
        "time without evaluations, checkpoints, waits for data and restarts",
    ]
    kinds = {config.model.attention_kind(layer) for layer in range(config.model.num_layers)}
    if kinds - {"dense"}:
        found.append("attention over routes reaches the same rate as dense attention")
    if plan.layout.region > 1 and "bi_level" in kinds:
        found.append(
            f"region ranks exchange {plan.exchange_fraction:.0%} of the bound of any route; trained runs moved 31 to "
            "40% of it at 2 to 64 ranks (docs/benchmarks/exchange.md)"
        )
    if not hardware.intra_node_latency_us and not hardware.inter_node_latency_us:
        found.append("links without latency: the profile has none")
    return found


def _axes(work: Workload, *, hidden: bool) -> str:
    return ", ".join(axis for axis in AXES if (axis in work.execution.hidden) is hidden)


def as_values(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values; bytes, seconds and FLOPs without prefix."""
    step, memory = plan.step, plan.memory
    resource, share = binding_resource(step)
    exchange = plan.region_exchange
    return {
        "device": plan.hardware.device,
        "devices": plan.layout.world_size,
        "nodes": _nodes(plan),
        "layout": {
            "tensor": plan.layout.tensor,
            "region": plan.layout.region,
            "data": plan.layout.data,
            "pipeline": plan.layout.pipe,
            "zero_stage": plan.layout.zero_stage,
            "sequence_parallel": plan.config.parallel.sequence_parallel,
            "activation_checkpointing": plan.config.train.activation_checkpointing,
            "microbatch_size": plan.config.train.microbatch_size,
        },
        "parameters": plan.parameters,
        "flops_per_step": plan.flops_per_step,
        "tokens_per_step": plan.config.tokens_per_step,
        "microbatches": plan.work.microbatches,
        "memory_bytes": {**memory.parts(), "total": memory.total, "device": plan.device_bytes},
        "memory_stage": plan.memory_stage,
        "fits": plan.fits,
        "bytes_per_step": dict(plan.bytes_by_axis),
        "region_exchange_bytes": None
        if exchange is None
        else {"expected": exchange.expected, "bound": exchange.bound, "causal_fetch": exchange.causal_fetch},
        "step_seconds": {**step.parts(), "total": step.total},
        "bubble_fraction": step.bubble / step.total,
        "binds": {"resource": resource, "share": share},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "steps": plan.config.train.steps,
        "seconds": plan.seconds,
        "device_hours": plan.device_hours,
        "cost": plan.cost,
        "assumed": assumptions(plan),
    }


def headline_tags(plan: Plan) -> dict[str, str]:
    """Return the headline numbers of a plan as tags of a run in MLflow; units are in the names."""
    return {
        f"{PREDICTED}device": plan.hardware.device,
        f"{PREDICTED}step_seconds": f"{plan.step.total:.6g}",
        f"{PREDICTED}tokens_per_second": f"{plan.tokens_per_second:.6g}",
        f"{PREDICTED}peak_gib": f"{plan.memory.total / GIB:.6g}",
        f"{PREDICTED}seconds": f"{plan.seconds:.6g}",
    }


def plan_table(plans: Sequence[Plan]) -> str:
    """Return the plans side by side, one column each."""
    first = plans[0]
    lines = [
        f"{first.parameters:,} parameters; a step: {first.config.tokens_per_step:,} tokens, "
        f"{first.flops_per_step:.3g} model FLOPs; {first.hardware.device}",
        "",
    ]
    return "\n".join(lines) + _aligned([[title, *(cell(plan) for plan in plans)] for title, cell in _rows(first)])


def _rows(first: Plan) -> list[tuple[str, Cell]]:
    """Return the titles of a table, and how each plan fills its cell. What is 0 in the first plan has no row."""
    rows: list[tuple[str, Cell]] = [
        ("devices (nodes)", lambda p: f"{p.layout.world_size} ({_nodes(p):g})"),
        ("layout", lambda p: str(p.layout)),
        ("microbatches of a step", lambda p: f"{p.work.microbatches} of {p.config.train.microbatch_size}"),
    ]
    rows += [
        (f"memory: {name}", lambda p, name=name: _gib(p.memory.parts()[name]))
        for name, size in first.memory.parts().items()
        if size
    ]
    rows += [
        ("memory: total", lambda p: f"{_gib(p.memory.total)} of {_gib(p.device_bytes)}"),
        ("fits", _fits),
    ]
    rows += [
        (f"sent a step: {axis}", lambda p, axis=axis: _bytes(p.bytes_by_axis[axis]))
        for axis in AXES
        if first.bytes_by_axis[axis]
    ]
    if first.region_exchange is not None:
        rows.append(("  routes: assumed, bound", _exchange))
    rows += [
        (f"step: {name}", lambda p, name=name: _part_of_step(p, name))
        for name, time in first.step.parts().items()
        if time
    ]
    rows += [
        ("step: total", lambda p: _seconds(p.step.total)),
        ("binds", lambda p: "{} {:.0%}".format(*binding_resource(p.step))),
        ("tokens/s", lambda p: f"{p.tokens_per_second:,.0f}"),
        ("MFU", lambda p: f"{p.mfu:.1%}"),
        ("time", lambda p: f"{duration(p.seconds)} for {p.config.train.steps:,} steps"),
        ("device-hours", lambda p: f"{p.device_hours:,.3g}" if p.device_hours < 100 else f"{p.device_hours:,.0f}"),
    ]
    if first.cost is not None:
        rows.append(("cost", lambda p: f"{p.cost:,.2f}"))
    return rows


def _nodes(plan: Plan) -> float:
    return plan.layout.world_size / plan.hardware.devices_per_node


def _part_of_step(plan: Plan, name: str) -> str:
    time = plan.step.parts()[name]
    return f"{_seconds(time)} {time / plan.step.total:4.0%}"


def _fits(plan: Plan) -> str:
    if plan.fits:
        return "yes"
    override = remedy(plan)
    over = _gib(plan.memory.total - plan.device_bytes)
    return f"no: {over} too much; " + (f"{override} would fit" if override else "try --search, or more nodes")


def too_large(plan: Plan, change: str | None) -> str:
    """Say by how much a plan that does not fit is too large, and which `change`, if any is known, makes it fit."""
    advice = f"with {change} it would fit" if change else "use a smaller model, or devices with more memory"
    return f"{_over(plan)}; {advice}"


def nothing_fits(smallest: Plan) -> str:
    """Say by how much the smallest of all layouts is too large, and what may help."""
    smaller = ", or train.microbatch_size=1" if smallest.config.train.microbatch_size > 1 else ""
    return f"{_over(smallest)}; plan more --nodes{smaller}"


def _over(plan: Plan) -> str:
    hardware, over = plan.hardware, plan.memory.total - plan.device_bytes
    return (
        f"the run does not fit: a rank needs {_gib(plan.memory.total)} in layout {plan.layout}, and "
        f"{hardware.device} has {hardware.memory_gib:g} GiB, {_gib(over)} too few"
    )


def _exchange(plan: Plan) -> str:
    exchange = plan.region_exchange
    return "" if exchange is None else f"{_bytes(exchange.expected)}, {_bytes(exchange.bound)}"


def search_table(found: Found, most: int = 10) -> str:
    """Return the fastest layouts, and in counts why others fell out."""
    lines = [["layout", "recompute", "sequence parallel", "memory", "step", "tokens/s", "MFU", "binds"]]
    for plan in found.plans[:most]:
        lines.append(
            [
                str(plan.layout),
                "yes" if plan.config.train.activation_checkpointing else "no",
                "yes" if plan.config.parallel.sequence_parallel else "no",
                _gib(plan.memory.total),
                _seconds(plan.step.total),
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.mfu:.1%}",
                binding_resource(plan.step)[0],
            ]
        )
    total = len(found.plans) + sum(found.dropped.values())
    text = f"{total} layouts tried, {len(found.plans)} are legal and fit"
    text += f"; the fastest {min(most, len(found.plans))}:\n" if found.plans else "\n"
    text += _aligned(lines) if found.plans else ""
    if found.smallest is not None:
        least, over = found.smallest, _gib(found.smallest.memory.total - found.smallest.device_bytes)
        recompute = "yes" if least.config.train.activation_checkpointing else "no"
        text += (
            f"least memory: {least.layout}, recompute {recompute}: "
            f"{_gib(least.memory.total)} of {_gib(least.device_bytes)}, {over} too much"
        )
    for reason, count in found.dropped.items():
        text += f"\nfell out: {count:5} {reason}"
    return text


def _aligned(rows: list[Row]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _gib(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def _seconds(time: float) -> str:
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def duration(seconds: float) -> str:
    """Format a time in its largest fitting unit."""
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} seconds"
