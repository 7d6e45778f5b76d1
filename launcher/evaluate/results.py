"""What an evaluation found: of one checkpoint, by section, as names and numbers for MLflow, as a table, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biroute.launcher.evaluate.measure import Measure

PREFIX = "evaluate/"


@dataclass(frozen=True)
class Section:
    """What was measured on one text, or by one task.

    Attributes:
        name: heldout, or the name of the text, or of the task.
        about: what it was measured on and how, one sentence.
        measures: by name, such as `loss` or `position/00064`.
        unit: what the counts of the measures are, and what standard errors are over.
        chance: of the accuracies, if they are some.
    """

    name: str
    about: str
    measures: Mapping[str, Measure]
    unit: str
    chance: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Of one checkpoint."""

    checkpoint: str
    step: int
    settings: Mapping[str, Any]
    sections: Sequence[Section] = field(default_factory=tuple)

    def metrics(self) -> dict[str, float]:
        """Return the numbers under the names that MLflow shows: `evaluate/heldout/loss`, `..._error` and so on.

        What was not measured, as the loss on AR hits where there are none, is left out.
        """
        found = {}
        for section in self.sections:
            for name, measure in section.measures.items():
                for ending, value in (("", measure.value), ("_error", measure.error)):
                    if math.isfinite(value):
                        found[f"{PREFIX}{section.name}/{name}{ending}"] = value
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds: numbers that are not there are null."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "settings": dict(self.settings),
            "sections": [
                {
                    "name": section.name,
                    "about": section.about,
                    "unit": section.unit,
                    **({} if section.chance is None else {"chance": section.chance}),
                    "measures": {
                        name: {"value": _number(one.value), "standard_error": _number(one.error), "count": one.count}
                        for name, one in section.measures.items()
                    },
                }
                for section in self.sections
            ],
        }


def rows(section: Section) -> list[tuple[str, str, str, str]]:
    """Return name, value, standard error and count of each measure as text."""
    return [(name, _text(one.value), _text(one.error), f"{one.count:,}") for name, one in section.measures.items()]


def table(evaluation: Evaluation) -> str:
    """Return what the terminal shows: a few lines for each section."""
    lines = [f"{evaluation.checkpoint} (step {evaluation.step})"]
    for section in evaluation.sections:
        lines += ["", f"{section.name}: {section.about}"]
        cells = [("", "value", "± error", section.unit.split(";")[0]), *rows(section)]
        if section.chance is not None:
            cells.append(("chance", _text(section.chance), "", ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for name, *numbers in cells:
            numbers = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  " + "  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"
