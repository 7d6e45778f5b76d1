"""`biroute generate`: what is refused before a model is loaded, and what the terminal shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.generate import generate_app
from biroute.launcher.generate.continuation import Continuation, Prompt
from biroute.launcher.generate.output import Terminal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "use --prompt TEXT or --prompts FILE: neither is given"),
        (["--prompt", "a", "--prompts", "b"], "both are given"),
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt", "a", "--top-p", "0"], "--top-p=0.0 is out of range"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--samples", "0"], "--samples=0 is out of range; use at least 1"),
        (["--prompt", "a", "--precision", "fp8"], "--precision=fp8 is unknown; use fp32 or bf16"),
        (["--prompt", "a"], "no-run has no folder checkpoints"),
    ],
)
def test_bad_input_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(generate_app, ["no-run", *arguments])
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_usage_error_is_one_line_with_status_2_and_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['biroute', 'generate', 'no-run', '--prompt', 'a', '--min-p', '2']\n"
        "from biroute.launcher.cli.main import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --min-p=2.0 is out of range; use from 0 (all tokens) to 1\n"


def test_one_text_streams_and_several_wait_for_their_turn(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Continuation(Prompt(0, "To be", (1,)))
    single = Terminal(1, echo=True)
    single.on_text(answer, " or")
    assert capsys.readouterr().out == "To be or"
    answer.text, answer.reason = " or\x1b not", "max_tokens"
    single.on_text(answer, "\x1b not")
    single.show([answer])
    assert capsys.readouterr().out == "\\x1b not\n"  # nothing that a model writes commands the terminal
    other = Continuation(Prompt(1, "床", (2,), 1), text="前", reason="stop")
    several = Terminal(2, echo=False)
    several.on_text(answer, "x")
    assert capsys.readouterr().out == ""
    several.show([answer, other])
    assert capsys.readouterr().out == "--- prompt 0, sample 0\n or\\x1b not\n--- prompt 1, sample 1\n前\n"
