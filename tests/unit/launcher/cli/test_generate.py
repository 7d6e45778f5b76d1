"""`biroute generate`: what is refused before a model is loaded, and what the terminal shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.configs.messages import printable
from biroute.launcher.cli.generate import generate_app
from biroute.launcher.generate.continuation import Continuation, Prompt
from biroute.launcher.generate.output import Terminal, as_json
from biroute.launcher.generate.sampling import Choice


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


def test_a_single_text_streams(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Continuation(Prompt(0, "To be", (1,)))
    terminal = Terminal([answer.prompt], echo=True)
    terminal.on_text(answer, " or")
    assert capsys.readouterr().out == "To be or"
    answer.reason = "max_tokens"
    terminal.on_text(answer, "\x1b not")
    assert capsys.readouterr().out == "\\x1b not\n"  # nothing that a model writes commands the terminal


def test_several_texts_wait_for_their_turn(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [Prompt(0, "床", (1,)), Prompt(0, "床", (1,), 1), Prompt(1, "to", (2,))]
    first, second, third = (Continuation(prompt, text=f"text {n}") for n, prompt in enumerate(prompts))
    terminal = Terminal(prompts, echo=True)
    for answer, shown in (
        (second, ""),
        (first, "--- prompt 0, sample 0\n床text 0\n--- prompt 0, sample 1\n床text 1\n"),
        (third, "--- prompt 1, sample 0\ntotext 2\n"),
    ):
        terminal.on_text(answer, "a piece")
        assert capsys.readouterr().out == ""
        answer.reason = "stop"
        terminal.on_text(answer, "")
        assert capsys.readouterr().out == shown


def test_json_is_json_whatever_the_model_wrote() -> None:
    class Bytes:
        def decode_bytes(self, ids: list[int]) -> bytes:
            return bytes(ids)

    text = "床\x9b\x1b\u202e\x7f"
    answer = Continuation(Prompt(0, "p", (1,)), [Choice(194, -0.5)], text, "stop", "x")
    printed = printable(as_json([answer], Bytes(), {"step": 3}))  # type: ignore[arg-type]
    assert "床" in printed and "\x9b" not in printed
    (found,) = json.loads(printed)["texts"]
    assert (found["text"], found["stopped_at"]) == (text, "x")
    assert found["tokens"] == [{"id": 194, "bytes": [194], "log_probability": -0.5}]
