"""The folder of checkpoints: what counts as one, and what is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from biroute.parallel.checkpoint import survey as survey_module
from biroute.parallel.checkpoint.files import fingerprint, folder_of_step, list_checkpoints, prune, unfinished_folder
from biroute.parallel.checkpoint.meta import CheckpointMeta, read_meta
from biroute.parallel.checkpoint.survey import checkpoint_of, survey


def write_meta(directory: Path, step: int, **fields: object) -> Path:
    """A checkpoint of one file of four bytes."""
    path = folder_of_step(directory, step)
    path.mkdir(parents=True)
    name = "weights-pipe00-tensor00-part00.pt"
    (path / name).write_bytes(b"abcd")
    meta = CheckpointMeta.model_validate(
        {
            "progress": {"step": step, "sequences": step, "tokens": 1000 * step},
            "about": {"model": {"size": 1}, "layout": "data=2", "written_by": "me on n1, attempt 3, BiRoute 0"},
            "files": {name: fingerprint(path / name).model_dump()},
            "parameters": {},
            **fields,
        }
    )
    (path / "meta.json").write_text(meta.model_dump_json())
    return path


THEIRS = (
    "step-old",
    "step-3",
    "step-00000002-copy",
    "step-00000009.bak",
    "step-final.partial",
    "notes",
    "STEP-00000001",
)


def test_only_names_that_a_save_writes_count(tmp_path: Path) -> None:
    ours = [f"step-{step:08d}" for step in (2, 10, 99_999_999, 100_000_000)]
    for name in (*THEIRS, *ours):
        (tmp_path / name).mkdir()
    for attempt in (0, 7, 12_345):
        unfinished_folder(tmp_path, 11, attempt).mkdir()
    assert folder_of_step(tmp_path, 10).is_dir()
    (tmp_path / "step-00000012").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ours[::-1]
    prune(tmp_path, keep=2, newest=100_000_000)
    assert {path.name for path in tmp_path.iterdir()} == {*THEIRS, *ours[2:], "step-00000012"}


def test_what_is_kept_for_ever_is_not_pruned(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_meta(tmp_path, step, kept=step % 2 == 0)
    (folder_of_step(tmp_path, 3) / "meta.json").write_text("{")  # damaged
    prune(tmp_path, keep=1, newest=6)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [6, 4, 2]


def test_a_damaged_newer_one_takes_no_place(tmp_path: Path) -> None:
    """A run that went back to step 2, as the checkpoint of step 9 is damaged, and now has saved step 3."""
    for step in (1, 2, 3, 9):
        write_meta(tmp_path, step)
    (folder_of_step(tmp_path, 9) / "meta.json").write_text("{")
    prune(tmp_path, keep=1, newest=3)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [9, 3]


def test_a_renamed_one_is_no_checkpoint_and_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_meta(tmp_path, step)
    folder_of_step(tmp_path, 1).rename(folder_of_step(tmp_path, 0))
    folder_of_step(tmp_path, 2).rename(folder_of_step(tmp_path, 12))  # as if it were the newest
    found = survey(tmp_path, deep=False)
    assert [bool(one.problem) for one in found] == [True, False, False, True]
    assert "it holds step 2; give the folder its own name back" in found[0].problem
    assert checkpoint_of(tmp_path, None) == folder_of_step(tmp_path, 4)
    prune(tmp_path, keep=1, newest=4)
    assert [int(path.name[-2:]) for path in list_checkpoints(tmp_path)] == [12, 4, 0]


def test_one_that_a_run_removes_while_it_is_looked_at_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_meta(tmp_path, step)

    def remove_first(path: Path) -> CheckpointMeta:
        if path.name.endswith("1"):
            shutil.rmtree(path)
        return read_meta(path)

    monkeypatch.setattr(survey_module, "read_meta", remove_first)
    assert [one.path.name for one in survey(tmp_path, deep=False)] == ["step-00000002"]
