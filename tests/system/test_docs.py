"""The newcomer's page, followed to the letter: its YAML, its commands, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.corpus import standard_library_docstrings

from .conftest import biroute

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_data.md"


def test_little_text_becomes_a_model_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 notes of 4 kB."""
    section = PAGE.read_text(encoding="utf-8").partition("## Little text")[2].partition("\n## ")[0]
    (config,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "little.yaml").write_text(config)
    (tmp_path / "notes").mkdir()
    text = "\n".join(standard_library_docstrings(3000)).encode()
    for n in range(80):
        (tmp_path / "notes" / f"{n}.txt").write_bytes(
            text[4000 * n : 4000 * (n + 1)].decode(errors="ignore").encode()
        )
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        answer = biroute(*words)
        assert program == "biroute" and answer.status == 0, (line, answer.err)
    assert "step-00000060" in answer.out and "complete" in answer.out
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", (tmp_path / LOG).read_text())]
    assert losses[-1] < losses[0] - 0.5, "it learns"


LOG = "runs/notes/logs/attempt-0001/rank-00000.log"
