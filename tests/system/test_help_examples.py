"""The examples in `--help`, run as they are written, where the shipped configurations and a small corpus are."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import zstandard
from helpers.corpora import chinese_texts, write_jsonl
from helpers.corpus import standard_library_docstrings

from biroute.configs.load import load_config
from biroute.launcher.cli.lazy import MOUNTED, load_command
from biroute.launcher.cli.main import app

from .conftest import biroute

ROOT = Path(__file__).resolve().parents[2]


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(load_command(name) if name in MOUNTED else inner)


def examples() -> list[list[str]]:
    """The words of every example, in the order of the commands."""
    found = [line for one in [typer.main.get_command(app), *map(load_command, MOUNTED)] for line in lines_of(one)]
    return [shlex.split(line) for line in dict.fromkeys(found)]


def lines_of(command: Any) -> Iterator[str]:
    for one in commands(command):
        for line in (one.help or "").splitlines():
            if line.strip().startswith("Example: "):
                yield line.strip().removeprefix("Example: ")


EXAMPLES = examples()


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_an_example_parses_and_names_what_is_shipped(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert words[0] == "biroute"
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    context = command.make_context("biroute", list(rest))
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        command = load_command(name) if name in MOUNTED else command
        context = command.make_context(name, list(rest), parent=context)
    given = context.params
    if "config" in given:
        load_config(given["config"], given.get("overrides") or [])
    for path in given.get("compare") or ():
        load_config(path, given["overrides"] or [])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped configurations and, in the place of the demo's text, a small corpus."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        shutil.copy(path, folder / "configs")
    for config in (folder / "configs").iterdir():  # the hundredth part of a small corpus fills no evaluation
        text = config.read_text()
        config.write_text(text.replace("data:\n", "data:\n  heldout_fraction: 0.3\n", 1))
    for name, texts in (("english", standard_library_docstrings(2000)), ("chinese", chinese_texts(2000))):
        plain = write_jsonl(folder / f"{name}.jsonl", texts)
        packed = folder / "data" / "demo" / "text" / f"{name}.jsonl.zst"
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(zstandard.compress(plain.read_bytes()))
    return folder


def example(beginning: str) -> list[str]:
    (found,) = [words for words in EXAMPLES if " ".join(words).startswith(f"biroute {beginning}")]
    return found[1:]


def test_examples_of_data_and_training_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for beginning in (
        "data build", "data verify", "data inspect", "data bigram", "train", "checkpoint list",
        "checkpoint verify", "checkpoint copy", "generate",
    ):  # fmt: skip
        answer = biroute(*example(beginning))
        assert answer.status == 0, (beginning, answer.err)
        assert answer.out, beginning
        if beginning == "train":
            assert "step 50/50" in answer.out
    words = example("ui")
    port = words[words.index("--port") + 1]
    program = [sys.executable, "-m", "biroute.launcher.cli.main", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            wait_for_page(f"http://127.0.0.1:{port}")
        finally:
            server.send_signal(signal.SIGINT)


def wait_for_page(address: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address) as page:
                assert page.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, f"{address} did not answer"
            time.sleep(0.2)


def test_an_example_of_submitting_needs_nothing_but_slurm(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(workplace)
    biroute(*example("data build"))
    answer = biroute(*example("submit"), PATH=str(tmp_path))
    assert answer.status == 2
    assert "no such command; run this on a login node of a Slurm cluster" in answer.err
