"""The names of what `biroute evaluate` can measure: our own, and lm-eval's behind `lm_eval:`. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from biroute.configs.errors import UsageError

LOSS = "loss"  # no task of questions: what `biroute.launcher.evaluate.losses` measures
NAMES = (LOSS, "needle", "recall", "tracking", "cloze", "choice")
HARNESS = "lm_eval:"  # before the name of a task, group or tag of lm-eval


def task_names(wanted: str) -> list[str]:
    """Return the names in a list such as `loss,needle,lm_eval:arc_easy`; "all" stands for all of our own.

    Whether lm-eval knows a name is not asked here (`biroute.launcher.evaluate.harness`).

    Raises:
        UsageError: there is no such task, or none is named.
    """
    names = [name for part in wanted.split(",") if (name := part.strip())]
    for name in names:
        if name not in (*NAMES, "all") and not name.startswith(HARNESS):
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            others = f"there are {', '.join(NAMES)}, or all; a task of lm-eval is {HARNESS}{name}"
            raise UsageError(f"--tasks: unknown task {name}; {f'did you mean {near[0]}?' if near else others}")
        if name == HARNESS:
            raise UsageError(f"--tasks: {HARNESS} names no task; name one, such as {HARNESS}arc_easy")
    if not names:
        raise UsageError(f"--tasks names no task; there are {', '.join(NAMES)}, or all")
    ours = [one for name in names for one in (NAMES if name == "all" else (name,))]
    return list(dict.fromkeys(ours))


def harness_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return those of lm-eval, without the prefix."""
    return tuple(name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS))
