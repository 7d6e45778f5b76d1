"""`biroute evaluate`: what is refused before a model is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.evaluate import evaluate_app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no-run has no folder checkpoints"),
        (["--every-checkpoint"], "no-run has no folder checkpoints"),
        (["--checkpoint", "3", "--every-checkpoint"], "exclude each other"),
        (["--follow"], "--follow is for --every-checkpoint"),
        (["--limit", "0"], "--limit=0 is out of range; use at least 1"),
        (["--window", "0"], "--window=0 is out of range"),
        (["--stride", "4"], "--stride=4 is for --text"),
        (["--name", "a/b"], "--name='a/b' is no name"),
        (["--precision", "fp8"], "--precision=fp8 is unknown"),
    ],
)
def test_bad_input_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(evaluate_app, ["no-run", *arguments])
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_an_unknown_task_is_one_line_with_status_2_and_needs_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['biroute', 'evaluate', 'no-run', '--tasks', 'nedle']\n"
        "from biroute.launcher.cli.main import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --tasks: unknown task nedle; did you mean needle?\n"
