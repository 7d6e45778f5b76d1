"""The results of a scaling study: plain values, a page with tables and a picture, and a description for MLflow."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from biroute.launcher.bench.report import COLOURS, Findings, Page, Part, Picture, Table
from biroute.launcher.plan.hardware import HardwareProfile
from biroute.launcher.scale.measure import Measured, as_values, plan_of
from biroute.launcher.scale.study import Study
from biroute.launcher.track.figures import new_figure, save_figure
from biroute.launcher.track.run_metadata import environment_tags

NAME = "scaling"  # of the files


def study_values(study: Study, found: Sequence[Measured], hardware: HardwareProfile | None) -> dict[str, Any]:
    """Return the results of the finished sizes as plain values, the smallest first."""
    base = found[0]
    plans = [plan_of(one.size, hardware) for one in found]
    tags = environment_tags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "study": study.name,
        "mode": study.mode,
        "steps": study.steps,
        "first_step_counted": base.first_step,
        "missing_ranks": [size.ranks for size in study.sizes if size.ranks not in {one.ranks for one in found}],
        "facts": {
            "machine": f"{platform.machine()}, {cores} core(s)",
            "software": f"torch {tags.get('version.torch', 'unknown')}, biroute {tags.get('version.biroute', '')}",
            "code": tags.get("git.commit", "unknown")[:10],
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        },
        "sizes": [as_values(one, base, plan, plans[0]) for one, plan in zip(found, plans, strict=True)],
    }


def study_page(values: dict[str, Any]) -> Page:
    """Build the page of a study from its values."""
    grows = "grows with the data ranks" if values["mode"] == "weak" else "is the same for all sizes"
    introduction = (
        f"# {values['mode'].capitalize()} scaling\n\n"
        "Made by `biroute scale`. Each row is a run of `biroute train` with real processes; the batch "
        f"{grows}. Times are medians over the steps from {values['first_step_counted']} on of {values['steps']}; "
        "efficiency is tokens/s of a rank, relative to the smallest size."
    )
    sizes = values["sizes"]
    parts: list[Part] = [_speed(sizes), _breakdown(sizes), *_bytes(sizes), Findings(_findings(values))]
    parts.append(Picture("Tokens per second, efficiency and time of a step by ranks", partial(_draw, values)))
    return Page(NAME, introduction, values["facts"], parts)


def study_note(values: dict[str, Any]) -> str:
    """Return the description of the parent run in Markdown."""
    page = study_page(values)
    tables = [part.markdown() for part in page.parts if isinstance(part, Table | Findings)]
    return "\n\n".join([page.introduction, *tables])


def _speed(sizes: Sequence[dict[str, Any]]) -> Table:
    header = ["ranks", "layout", "batch", "step", "fastest to slowest", "tokens/s", "efficiency", "peak of a rank"]
    predicted = bool(sizes[0]["predicted"])
    header += ["predicted step", "predicted efficiency", "predicted peak"] if predicted else []
    rows = []
    for one in sizes:
        row = [
            str(one["ranks"]), one["layout"], str(one["global_batch_size"]), _seconds(one["step_seconds"]),
            f"{_seconds(one['fastest_step_seconds'])} to {_seconds(one['slowest_step_seconds'])}",
            f"{one['tokens_per_second']:,.0f}", f"{one['efficiency']:.0%}", f"{one['peak_gib']:.2f} GiB",
        ]  # fmt: skip
        if predicted:
            plan = one["predicted"]
            row += [_seconds(plan["step_seconds"]), f"{plan['efficiency']:.0%}", f"{plan['peak_gib']:.2g} GiB"]
        rows.append(row)
    return Table("Speed and memory", header, rows)


def _breakdown(sizes: Sequence[dict[str, Any]]) -> Table:
    names = list(sizes[0]["phase_seconds"])
    rows = [
        [str(one["ranks"]), *(f"{_seconds(one['phase_seconds'][name])} {_share(one, name):.0%}" for name in names)]
        for one in sizes
    ]
    return Table("Time of a step", ["ranks", *names], rows)


def _share(one: dict[str, Any], phase: str) -> float:
    """Return the share of a step that a phase takes."""
    share: float = one["phase_seconds"][phase] / one["step_seconds"]
    return share


def _bytes(sizes: Sequence[dict[str, Any]]) -> list[Table]:
    """The bytes of each axis: computed from sizes, and of the region axis also counted."""
    axes = [axis for axis in sizes[0]["computed_bytes"] if any(one["computed_bytes"][axis] for one in sizes)]
    if not axes:
        return []
    header, rows = ["ranks", *(f"{axis}, computed" for axis in axes)], []
    counted = any(one["region_bytes"] is not None for one in sizes)
    for one in sizes:
        row = [str(one["ranks"]), *(_mebibytes(one["computed_bytes"][axis]) for axis in axes)]
        rows.append([*row, _mebibytes(one["region_bytes"] or 0.0)] if counted else row)
    return [Table("Bytes of a rank in a step, by axis", [*header, *(["region, counted"] if counted else [])], rows)]


def _findings(values: dict[str, Any]) -> list[str]:
    first, last = values["sizes"][0], values["sizes"][-1]
    lines = []
    if len(values["sizes"]) > 1:
        times = last["tokens_per_second"] / first["tokens_per_second"]
        lines.append(
            f"From {_ranks(first)} to {last['ranks']}, tokens/s grow {times:.2f} times: {last['efficiency']:.0%} "
            "efficiency."
        )
        grown = {name: _share(last, name) - _share(first, name) for name in last["phase_seconds"]}
        name = max(grown, key=lambda one: grown[one])
        if grown[name] > 0:
            lines.append(
                f"What grows most is {name}: {_share(first, name):.0%} of a step with {_ranks(first)}, "
                f"{_share(last, name):.0%} with {last['ranks']}."
            )
    if first["predicted"]:
        lines.append(f"Predicted for {first['predicted']['device']}, by `biroute plan`.")
    if values["missing_ranks"]:
        lines.append(f"Not finished: {', '.join(map(str, values['missing_ranks']))} ranks.")
    return lines


def _ranks(one: dict[str, Any]) -> str:
    return f"{one['ranks']} rank{'s' if one['ranks'] > 1 else ''}"


def _draw(values: dict[str, Any], path: Path) -> None:
    sizes = values["sizes"]
    figure, (rate, share, time) = new_figure(3)
    ranks = [one["ranks"] for one in sizes]
    rates = [one["tokens_per_second"] for one in sizes]
    rate.plot(ranks, rates, color=COLOURS[0], marker="o", label="measured")
    rate.plot(ranks, [rates[0] * n / ranks[0] for n in ranks], color="#5f6368", linestyle="--", label="in proportion")
    share.plot(ranks, [one["efficiency"] for one in sizes], color=COLOURS[0], marker="o", label="measured")
    if sizes[0]["predicted"]:
        plans = [one["predicted"] for one in sizes]
        predicted = [one["tokens_per_second"] for one in plans]
        if predicted[0] < 5 * rates[0]:  # of another machine it would press all else to the axis; the table has it
            rate.plot(ranks, predicted, color=COLOURS[1], marker="s", label="predicted")
        share.plot(ranks, [one["efficiency"] for one in plans], color=COLOURS[1], marker="s", label="predicted")
    rate.set(title=f"Tokens per second, {values['mode']} scaling", xlabel="ranks", ylabel="tokens/s")
    share.set(title="Efficiency", xlabel="ranks", ylabel="tokens/s of a rank, relative", ylim=(0, None))
    names, base = [str(n) for n in ranks], [0.0] * len(ranks)
    for name, colour in zip(sizes[0]["phase_seconds"], COLOURS, strict=False):
        heights = [one["phase_seconds"][name] for one in sizes]
        time.bar(names, heights, bottom=base, color=colour, label=name, width=0.6)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    time.set(title="Time of a step", xlabel="ranks", ylabel="seconds")
    for axes in (rate, share, time):
        axes.legend(fontsize=7, frameon=False)
    for axes in (rate, share):
        axes.set_xticks(ranks)
    save_figure(figure, path)


def _seconds(time: float) -> str:
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def _mebibytes(size: float) -> str:
    return f"{size / (1 << 20):.3g} MiB"
