"""Write docs/benchmarks/plan.md, predictions beside public runs and beside what `biroute bench plan` measured.

`make docs` calls it. The same tree gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "plan.md"
MEASURED = PAGE.with_name("plan-measured.json")
sys.path.insert(0, str(ROOT / "tests"))

from helpers.public_runs import (  # noqa: E402
    MEASURED_MEMORY,
    TIMED,
    PublicRun,
    fit_efficiency,
    memory_error,
    profile,
    time_error,
)

from biroute.launcher.bench.plan import page as measured_page  # noqa: E402
from biroute.launcher.plan.hardware import GIB  # noqa: E402

INTRODUCTION = """# Predictions of `biroute plan` beside measurements

Made by `docs/write_plan_page.py`; do not edit. How the predictions are made: [plan.md](../plan.md). First what
`biroute bench plan` measured on CPUs, then public runs on GPUs.
"""
MEASURED_INTRODUCTION = """# Measured on CPUs

`biroute bench plan` trains {cases} layouts of small models for some steps with real processes (gloo, fp32, one
thread each) and keeps what it found in `plan-measured.json`, from which this page is made. No formula was fitted to
these layouts: the rates come from `biroute bench hardware`, which measures each operation apart and at other sizes
(`launcher/bench/cpu_rates.py`), with as many processes as the layout has.

- machine: {machine}; {software}; {date}
- time of a step: {within} of {timed} layouts within 25%, mean error {mean:.0%}, worst {worst:.0%}
"""
BYTES = """Counted where all libraries must pass, at torch's process groups, and turned into what a ring sends.
Scalars are left out on both sides. *Routes*: what routed layers exchange depends on what they chose, so there
is only a bound; for windows the bytes are exact. Of the rank that sends most."""
MEMORY = """Growth of the process' resident memory over what it held before the model was built (after a small
model of the same kind had been trained, so that libraries are loaded), at its high-water mark; the allocator
returns what is freed, so that fragmentation is not counted. Of the rank that holds most."""
TIME = """Median step of the slowest rank; beside it the fastest and the slowest step of all. Layouts of four
ranks are not timed: there are two cores."""
MEASURED_WHY = """### What is off, and why

What is called a cause here is not proven, where it says so.

- *Nearly all are predicted too fast*, dense layouts of one rank by 2 to 7%, routed ones by 7 to 16%. A rate is
  measured in a loop over one operation, whose data stay in the caches. Of routed layers the descriptors are left out
  of the formulas, and gathering small regions takes longer than the one rate of copies says.
- *The machine varies.* It is a virtual one, and nothing else ran on it. On the day before, while other work did (and
  routed attention was a little slower), the same command found matrix products at 0.157 instead of 0.210 TFLOP/s,
  steps that took 13 to 49% longer, and 17 of 18 layouts within 25%.
- *Two ranks.* A core alone is faster than one beside another: two processes that multiply matrices at the same moment
  may reach half of it each. How much a whole block loses is measured as one factor, 1.05 here, for all that a rank
  computes.
- *Region ranks* are 10 to 24% too fast. The last rank attends most and the others wait for it; its attention to
  earlier keys is a call of its own, whose results are merged, which the formulas leave out. How much that takes was
  not measured.
- *Memory* of pipelines is 6 to 8% too low, and of their last stage, which does not hold most, about 20%: what the
  pipeline engine keeps between microbatches is not in the formulas.
"""
PUBLIC = """# Public runs on GPUs

From `tests/helpers/public_runs.py`, where each run stands with all its numbers. Nothing in this part was run by the
authors. Each run is planned as its source describes it: what it recomputes, what
it sends beside computation, how many parts of the model a pipeline stage holds. What a source does not say is in the
last column. One number per GPU type is fitted, the *efficiency*, the fraction of the peak that matrix products and
attention reach: the one with the smallest mean error. All other rates are those of the data sheets.

The form of the formulas was chosen with these runs in view. Two others were tried: with the constant on memory and
links too, mean errors were 6.0% on A100 and 6.5% on H100; with links at 80% and memory at 85% of their data sheets,
5.8% and 5.3%.
"""
BY_SOURCE = """## How much the constant owes to the runs that it was fitted to

For each source: the constant fitted to the *other* sources of the same GPU type, and the errors of this one's runs
with it, which it has not seen.
"""
WHY = """## What is off, and what may be why

The reasons are not proven; each is something that the formulas leave out.

- *The largest models (rows 8, 9, 20, 21)*: too slow by 8 to 15%, and *the smallest on H100 (row 1)* too fast by 11%.
  Products of large matrices come nearer to the peak than those of small ones; one constant cannot say so.
- *MT-NLG (row 22)*: too fast by 15 to 19%. It is the oldest software here, its schedule is not interleaved, and its
  kernels may be more and smaller than the formulas assume.
- *Megatron-LM on 8,192 and more GPUs (rows 15, 16)*: too fast by about 10%. The formulas have no contention and no
  stragglers; the paper names both.
- *MegaScale (rows 13 to 17)* has a parallel transformer block and sliding windows, which are not modelled.
- *Rows 1 to 4*: the microbatch is not published, and matters: with microbatch 1, row 4 would be 24% too slow, since
  fewer gradients travel beside computation.
- *Memory of 70B and of 405B (rows 26, 27)* was 22% too low, until the formulas had what torchtitan does there and
  the source code says: inputs of matrices that tensor ranks keep gathered; a loss over divided words
  (`loss_parallel`) that holds four fp32 values for each token and word; logits that the last stage keeps to the end
  of a step; a copy of a block's gradients in the order of the ranks. Row 27 needs less when interleaved because its
  eight microbatches are no more than its stages: all backward passes of a rank's second part come before those of
  its first, so that whole fp32 gradients of only one part exist at a time, 12 GiB less.
- *Rows 27b* were not used to complete the formulas, which cannot tell them from row 27: a microbatch has as many
  tokens. That row 27 (82.5 GiB) needs 7 GiB more than the first of them (75.3) may be copies in another order, which
  tensor ranks make where a microbatch has several sequences. The longest one is 12% too low, which is not explained.
"""


def _sources(gpu: str) -> list[str]:
    return list(dict.fromkeys(run.source for run in TIMED if run.gpu == gpu))


def _summary(gpu: str) -> list[str]:
    runs = [run for run in TIMED if run.gpu == gpu]
    errors = [abs(time_error(run)) for run in runs]
    efficiency = profile(gpu).efficiency
    return [gpu, str(len(runs)), f"{efficiency:g}", f"{sum(errors) / len(errors):.1%}", f"{max(errors):.1%}"]


def _time_row(run: PublicRun) -> list[str]:
    step = run.plan().step
    parts = sorted(step.parts().items(), key=lambda part: -part[1])[:3]
    shares = ", ".join(f"{name} {seconds / step.total:.0%}" for name, seconds in parts)
    return [
        run.row, run.gpu, f"{run.devices:,}", f"{run.step_seconds:.2f}", f"{step.total:.2f}",
        f"{time_error(run):+.1%}", shares, run.assumed,
    ]  # fmt: skip


def _memory_row(run: PublicRun) -> list[str]:
    memory = run.plan().memory
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:3]
    sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return [
        run.row, f"{run.devices}", f"{run.memory_gib:.1f}", f"{memory.total / GIB:.1f}", f"{memory_error(run):+.1%}",
        sizes, run.assumed,
    ]  # fmt: skip


def _held_out(gpu: str, source: str) -> list[str]:
    runs = [run for run in TIMED if run.gpu == gpu]
    efficiency = fit_efficiency([run for run in runs if run.source != source])
    errors = [abs(time_error(run, efficiency)) for run in runs if run.source == source]
    return [
        source, gpu, str(len(errors)), f"{efficiency:g}", f"{sum(errors) / len(errors):.1%}", f"{max(errors):.1%}"
    ]  # fmt: skip


def _table(header: list[str], rows: list[list[str]], text_columns: tuple[int, ...] = (0,)) -> str:
    rule = ["---" if place in text_columns else "--:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def _measured(answer: dict[str, Any]) -> list[str]:
    """Our own measurements, beside predictions that are made anew."""
    errors = measured_page.time_errors(answer)
    within = sum(abs(error) <= 0.25 for error in errors.values())
    facts = answer["environment"]
    return [
        MEASURED_INTRODUCTION.format(
            cases=len(answer["cases"]), timed=len(errors), within=within, machine=facts["machine"],
            software=facts["software"], date=facts["date"],
            mean=sum(map(abs, errors.values())) / len(errors), worst=max(map(abs, errors.values())),
        ),
        _table(*measured_page.model_table(), tuple(range(6))),
        "### Bytes that a rank sends in a step\n\n" + BYTES,
        _table(*measured_page.bytes_table(answer), (0, 1, 4)),
        "### Peak memory of a rank, in MiB\n\n" + MEMORY,
        _table(*measured_page.memory_table(answer), (0, 5)),
        "### Time of a step, in seconds\n\n" + TIME,
        _table(*measured_page.time_table(answer), (0, 6)),
        MEASURED_WHY,
    ]  # fmt: skip


def text() -> str:
    """The page as Markdown."""
    gpus = ("a100", "h100")
    memory = [abs(memory_error(run)) for run in MEASURED_MEMORY]
    within = sum(error < 0.1 for error in memory)
    parts = [
        INTRODUCTION,
        *_measured(json.loads(MEASURED.read_text(encoding="utf-8"))),
        PUBLIC,
        _table(["GPU", "runs", "efficiency", "mean error", "worst"], [_summary(gpu) for gpu in gpus]),
        f"Memory: {within} of {len(memory)} within 10%, mean error {sum(memory) / len(memory):.1%}, worst "
        f"{max(memory):.1%}; nothing is fitted.",
        "## Time of a step, in seconds",
        _table(
            ["run", "GPU", "GPUs", "published", "predicted", "error", "largest parts", "assumed"],
            [_time_row(run) for run in TIMED],
            (0, 1, 6, 7),
        ),
        "Rows 1 to 9 are published as TFLOP/s by Megatron's rule (the whole square of attention, equation 3 of "
        "arXiv:2104.04473), rows 10 to 12 as TFLOP/s without a rule; the seconds follow from them.",
        "## Peak memory of a GPU, in GiB",
        _table(
            ["run", "GPUs", "published", "predicted", "error", "largest parts", "assumed"],
            [_memory_row(run) for run in MEASURED_MEMORY],
            (0, 5, 6),
        ),
        BY_SOURCE,
        _table(
            ["source", "GPU", "runs", "efficiency of the others", "mean error", "worst"],
            [_held_out(gpu, source) for gpu in gpus for source in _sources(gpu)],
            (0, 1),
        ),
        WHY,
        "## Sources",
        "\n".join(
            f"- {', '.join(dict.fromkeys(run.row.split()[0].strip(',').rstrip('abcd') for run in runs))}: {source}"
            for source in dict.fromkeys(run.source for run in [*TIMED, *MEASURED_MEMORY])
            for runs in [[run for run in [*TIMED, *MEASURED_MEMORY] if run.source == source]]
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
