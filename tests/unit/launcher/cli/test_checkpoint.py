"""`biroute checkpoint`: what is there, whether it is sound, and a copy to go on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.checkpoint import checkpoint_app
from biroute.parallel.checkpoint.files import fingerprint, folder_of_step, unfinished_folder
from biroute.parallel.checkpoint.meta import CheckpointMeta

FILE = "weights-pipe00-tensor00-part00.pt"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 ... 4: of 3 only the checksum shows a damage, 4 has lost its file; 5 was never finished."""
    directory = tmp_path / "run" / "checkpoints"
    for step in range(1, 5):
        path = folder_of_step(directory, step)
        path.mkdir(parents=True)
        (path / FILE).write_bytes(b"abcd" * 1000)
        fields = {
            "progress": {"step": step, "sequences": step, "tokens": 1000 * step},
            "about": {"model": {"size": 1}, "layout": "data=2", "written_by": "me on n1, attempt 3, BiRoute 0"},
            "files": {FILE: fingerprint(path / FILE).model_dump()},
            "parameters": {},
            "kept": step == 2,
        }
        (path / "meta.json").write_text(CheckpointMeta.model_validate(fields).model_dump_json())
    (folder_of_step(directory, 3) / FILE).write_bytes(b"abcx" * 1000)
    (folder_of_step(directory, 4) / FILE).unlink()
    unfinished_folder(directory, 5, 1).mkdir()
    return tmp_path / "run"


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(checkpoint_app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UsageError):
        raise result.exception
    return result.exit_code, result.output


def test_list_shows_step_time_size_layout_and_writer(run_dir: Path) -> None:
    status, text = call("list", run_dir)
    lines = text.splitlines()
    assert status == 0 and len(lines) == 5
    assert lines[0].startswith("step-00000004") and lines[0].endswith(f": {FILE} is missing")
    assert lines[2].startswith("step-00000002")
    assert "2,000 tokens, data=2, me on n1, attempt 3, BiRoute 0, kept for ever: complete" in lines[2]
    assert lines[4].startswith("step-00000005.attempt-0001.partial") and "never finished" in lines[4]


def test_verify_finds_what_only_a_checksum_shows(run_dir: Path) -> None:
    status, text = call("verify", run_dir, "--json")
    found = {Path(one["path"]).name: one for one in json.loads(text)}
    assert status == 2
    assert found["step-00000003"]["problem"] == f"the checksum of {FILE} differs from meta.json"
    assert [found[f"step-0000000{step}"]["problem"] for step in (1, 2)] == ["", ""]
    assert (found["step-00000002"]["step"], found["step-00000002"]["layout"]) == (2, "data=2")
    for step in (3, 4):
        (folder_of_step(run_dir / "checkpoints", step) / "meta.json").write_text("{}")
    assert "meta.json is unreadable" in call("verify", run_dir)[1]


def test_copy_takes_a_sound_one_to_another_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"step-00000003: the checksum of .* differs from meta.json; choose another"):
        call("copy", run_dir, tmp_path / "new")
    assert not list((tmp_path / "new").rglob("step-*"))
    status, text = call("copy", run_dir, tmp_path / "new", "--step", 2)
    copied = folder_of_step(tmp_path / "new" / "checkpoints", 2)
    assert status == 0 and str(copied) in text
    assert (copied / FILE).read_bytes() == b"abcd" * 1000
    assert [path.name for path in copied.parent.iterdir()] == ["step-00000002"]
    with pytest.raises(UsageError, match="exists; remove it, or copy to another run folder"):
        call("copy", run_dir, tmp_path / "new", "--step", 2)
    with pytest.raises(UsageError, match="has no checkpoint of step 9; it has 4, 3, 2, 1"):
        call("copy", run_dir, tmp_path / "new", "--step", 9)


def test_a_folder_without_checkpoints_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no folder checkpoints; name a run folder, or its configuration"):
        call("list", tmp_path)
