"""`biroute bench memory` as a user runs it: real training runs, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Answer
from .test_cli_errors import assert_one_line

Command = Callable[..., Answer]


def test_rows_are_training_runs(config_file: Path, tmp_path: Path, command: Command) -> None:
    assert_one_line(command("bench", "memory", config_file, "--ranks", "3"), "parallel.region=3", "1, 2, 4, 8")
    for name in ("random", "queue", "torch", "biroute"):  # of the folder where it is run, and not what is meant
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    answer = subprocess.run(
        [
            Path(sys.executable).with_name("biroute"), "bench", "memory", config_file, "--ranks", "1", "--ranks", "2",
            "--steps", "1", "--json", "--out", tmp_path / "page",
        ],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    one, two = json.loads(answer.stdout)["rows"]
    assert (one["tokens_per_rank"], two["tokens_per_rank"]) == (64, 32)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["received_bytes"] == 0 < two["received_bytes"]
    assert min(one["peak_gib"], two["peak_gib"]) > 0.1, "Python and torch alone are more"
    text = (tmp_path / "page" / "memory.md").read_text("utf-8")
    assert f"| 1 | 64 | {one['peak_gib']:.2f} GiB | {one['peak_gib']:.1f} GiB | 1.00 |" in text
    assert (tmp_path / "page" / "memory.png").read_bytes().startswith(b"\x89PNG")
