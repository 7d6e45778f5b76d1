"""The pages say what is true: commands exist with these options, YAML is a configuration, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from lm_eval.config.task import TaskConfig

from biroute.configs.cluster_profile import ClusterProfile
from biroute.configs.load import config_from_tree
from biroute.launcher.cli.lazy import MOUNTED, load_command
from biroute.launcher.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The words of each line of bash, and of each command of ours in running text."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:biroute|make) [^`]*)`", page.read_text(encoding="utf-8"))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def command_named(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words call, and the words after its name."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands or name in MOUNTED, f"no command {name}"
        command = command.commands[name] if name in command.commands else load_command(name)
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_have_these_options(page: Path) -> None:
    for program, *words in commands_of(page):
        if program == "make":
            assert set(words) <= TARGETS, f"make {' '.join(words)}"
        elif program == "biroute" and words and "|" not in words[0] and words[0] not in ("...", "--help"):
            command, rest = command_named(words)
            if "..." in rest:
                continue
            known = {option for one in command.params for option in one.opts} | {"--help", "--version"}
            known |= {"--install-completion", "--show-completion"}
            given = {word.split("=")[0] for word in rest if word.startswith("-")}
            assert given <= known, f"biroute {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_a_configuration(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        sections = {"model", "data", "train", "optim", "parallel", "checkpoint", "tracking", "slurm"}
        if set(tree) <= sections:
            assert config_from_tree(tree, page.name).model_dump()
        elif "dataset_path" in tree:
            assert TaskConfig(**tree).task  # of lm-eval; it has no other fields
        else:
            assert ClusterProfile.model_validate(tree)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "benchmarks").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= seen, sorted(path.name for path in set(PAGES) - seen)
