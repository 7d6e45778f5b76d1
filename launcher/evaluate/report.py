"""The Markdown report of evaluations, and their JSON, in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.launcher.evaluate.results import Evaluation, rows

REPORT, NUMBERS = "evaluation.md", "evaluation.json"


def write_report(folder: Path, evaluations: Sequence[Evaluation], command: str) -> Path:
    """Write both files, in the place of earlier ones, and return the report's path.

    Args:
        folder: made if it does not exist.
        evaluations: of one or more checkpoints.
        command: the command that was run, which the report names.

    Raises:
        UsageError: the folder cannot be written.
    """
    make_folder(folder)
    try:
        numbers = json.dumps([one.as_dict() for one in evaluations], indent=1, ensure_ascii=False)
        write_atomically(folder / NUMBERS, numbers.encode())
        write_atomically(folder / REPORT, markdown(evaluations, command).encode())
    except OSError as error:
        raise UsageError(f"--out={folder}: cannot be written ({error.strerror}); name another folder") from None
    return folder / REPORT


def make_folder(folder: Path) -> None:
    """Make the folder of a report, before the work that it is to report.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out={folder}: cannot be made ({error.strerror}); name another folder") from None


def markdown(evaluations: Sequence[Evaluation], command: str) -> str:
    """Return the report."""
    lines = ["# Evaluation", "", "```bash", command, "```"]
    for evaluation in evaluations:
        lines += ["", f"## Step {evaluation.step}", "", f"Checkpoint `{evaluation.checkpoint}`; settings: "]
        lines[-1] += ", ".join(f"{name} {value}" for name, value in evaluation.settings.items()) + "."
        for section in evaluation.sections:
            lines += ["", f"### {section.name}", "", f"{section.about}."]
            if section.chance is not None:
                lines[-1] += f" Chance: {section.chance:.4f}."
            lines += [f"Counts are {section.unit}.", "", "| measure | value | standard error | count |"]
            lines += ["| --- | --: | --: | --: |", *(f"| {' | '.join(row)} |" for row in rows(section))]
    return "\n".join(lines) + "\n"
