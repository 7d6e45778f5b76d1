"""The folder of checkpoints: what counts as one, and what is left alone."""

from __future__ import annotations

from pathlib import Path

from biroute.parallel.checkpoint.files import folder_of_step, list_checkpoints, prune, unfinished_folder

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
    prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {*THEIRS, *ours[2:], "step-00000012"}
