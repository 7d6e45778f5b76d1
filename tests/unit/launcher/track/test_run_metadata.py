"""What MLflow is told of a run: parameters, tags, and the commit of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

from biroute.configs.load import config_from_tree
from biroute.launcher.track import run_metadata


def test_every_setting_is_a_parameter_or_a_tag() -> None:
    config = config_from_tree({"data": {"sources": [{"name": "long", "paths": ["x" * 9000]}]}}, "test")
    parameters, tags = run_metadata.parameters(config), run_metadata.placement_tags(config)
    assert parameters["optim.learning_rate"] == "0.0003"
    assert "parallel.tensor" not in tags and "train.run_dir" not in tags
    changed = config_from_tree({"parallel": {"tensor": 2}}, "test")
    assert run_metadata.placement_tags(changed) == {"parallel.tensor": "2"}
    assert run_metadata.placement_tags(config, {"parallel.tensor": "2"}) == {"parallel.tensor": "1"}
    assert not set(parameters) & set(tags)
    assert max(map(len, parameters.values())) == run_metadata.PARAMETER_CHARACTERS


def test_changed_parameters_are_named_with_both_values() -> None:
    before = {"train.steps": "100", "optim.beta1": "0.9"}
    assert run_metadata.changed_parameters(before, before) == ""
    assert run_metadata.changed_parameters(before, before | {"train.steps": "200", "new.field": "1"}) == (
        "train.steps: 100 -> 200"
    )


def test_git_tags_tell_commit_and_changes_only_of_tracked_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code, installed = tmp_path / "code.py", tmp_path / "installed.py"
    code.write_text("first\n")
    assert run_metadata.git_tags(code) == {}
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert run_metadata.git_tags(code)["git.commit"] == commit
    assert run_metadata.git_tags(code)["git.dirty"] == "false"
    code.write_text("second\n")
    assert run_metadata.git_tags(code)["git.dirty"] == "true"
    installed.write_text("a package in a virtual environment inside the checkout\n")
    assert run_metadata.git_tags(installed) == {}
