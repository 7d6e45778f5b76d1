"""The names of what `biroute evaluate` can measure. No torch."""

from __future__ import annotations

import difflib

from biroute.configs.errors import UsageError

LOSS = "loss"  # no task of questions: what `biroute.launcher.evaluate.losses` measures
NAMES = (LOSS, "needle", "recall", "cloze")


def task_names(wanted: str) -> list[str]:
    """Return the names in a list such as `loss,needle`; "all" stands for all of them.

    Raises:
        UsageError: there is no such task, or none is named.
    """
    names = [name for part in wanted.split(",") if (name := part.strip())]
    for name in names:
        if name not in (*NAMES, "all"):
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}, or all"
            raise UsageError(f"--tasks: unknown task {name}; {hint}")
    if not names:
        raise UsageError(f"--tasks names no task; there are {', '.join(NAMES)}, or all")
    return list(NAMES) if "all" in names else list(dict.fromkeys(names))
