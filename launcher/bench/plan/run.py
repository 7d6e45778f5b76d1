"""`biroute bench plan`: what the cases sent, held and took, in a JSON file from which the page is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from biroute.configs.errors import UsageError
from biroute.launcher.bench.hardware import measure_hardware, profile_of
from biroute.launcher.bench.plan.cases import CASES, Case
from biroute.launcher.bench.plan.measure import measure
from biroute.launcher.bench.plan.page import measured_seconds
from biroute.launcher.bench.report import environment_info, make_folder, say

FILE = "plan-measured.json"
Part = Literal["all", "bytes", "times"]


def run_bench(
    names: Sequence[str], part: Part, seconds: float, folder: Path | None, most_ranks: int, *, again: bool = False
) -> dict[str, Any]:
    """Run the cases, and keep what is finished in `folder`, beside what is there already.

    Args:
        names: of cases; none for all.
        part: "bytes" (of messages and memory), "times" (with hardware profiles), or both.
        seconds: of each measured rate, and of the steps of each case.
        folder: of the JSON file; None to keep nothing.
        most_ranks: cases of more ranks are not timed, since they would share cores.
        again: keep the profiles of the file, and of each case the faster steps of the file and of this run: what
            else runs on a machine only makes it slower.

    Returns:
        `environment`, `hardware` (ranks -> profile), and `cases` (name -> `counted`, `timed`: a list of ranks).

    Raises:
        UsageError: there is no such case, or the folder cannot be written.
    """
    cases = _selected(names)
    answer: dict[str, Any] = {"benchmark": "plan", "environment": {}, "hardware": {}, "cases": {}}
    if folder is not None:
        make_folder(folder)
        answer = _known(folder / FILE) or answer
    if part != "times":
        for case in cases:
            say(f"bytes and memory: {case.name}")
            answer["cases"].setdefault(case.name, {})["counted"] = measure(case, 0.0)
            _keep(answer, folder)
    if part != "bytes":
        timed = [case for case in cases if case.ranks <= most_ranks]
        for ranks in sorted({case.ranks for case in timed}):
            say(f"rates of {ranks} rank(s)")
            if again and str(ranks) in answer["hardware"]:
                continue
            profile = profile_of(measure_hardware(ranks, seconds / 3), ranks)
            answer["hardware"][str(ranks)] = profile.model_dump(exclude_none=True)
        for case in timed:
            say(f"time of a step: {case.name}")
            found, kept = measure(case, seconds), answer["cases"].setdefault(case.name, {})
            if not again or "timed" not in kept or measured_seconds(found) < measured_seconds(kept["timed"]):
                kept["timed"] = found
            _keep(answer, folder)
        answer["environment"] = environment_info(threads=1)
    _keep(answer, folder)
    return answer


def _selected(names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise UsageError(f"--case {name!r}: no such case; there are {'; '.join(known)}")
    return [known[name] for name in names] if names else list(CASES)


def _known(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        found["cases"], found["hardware"], found["environment"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: not a file of `biroute bench plan`; remove it, or name another --out") from None
    return dict(found)


def _keep(answer: dict[str, Any], folder: Path | None) -> None:
    if folder is not None:
        (folder / FILE).write_text(json.dumps(answer, indent=1, sort_keys=True) + "\n", "utf-8")
