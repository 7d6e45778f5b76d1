"""One check of a machine, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what is wrong with it.

    Attributes:
        name: what was looked at.
        value: what was found.
        problem: what is wrong, with the remedy; empty if nothing is.
    """

    name: str
    value: str
    problem: str = ""


def table(checks: Sequence[Check]) -> str:
    """Format checks as a table of plain text, problems last, one to a line."""
    width = max((len(check.name) for check in checks), default=0)
    lines = [
        f"{check.name:<{width}}  {check.value}" + ("  <- see below" if check.problem else "") for check in checks
    ]
    return "\n".join([*lines, *problems(checks)])


def problems(checks: Iterable[Check]) -> list[str]:
    """Return one line for each problem."""
    return [f"problem: {check.name}: {check.problem}" for check in checks if check.problem]
