"""The state of the uploader: damaged, copied, moved, and of another server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from biroute.launcher.track.artifact_uploader import is_inside
from biroute.launcher.track.upload_state import TrackingState

RUN_ID = "0123456789abcdef" * 2


def test_state_survives_and_starts_over_for_another_target(tmp_path: Path) -> None:
    path = tmp_path / "tracking_state.json"
    state = TrackingState.load(path, "server experiment", 500, print)
    state.run_id, state.sent_bytes, state.artifacts = RUN_ID, 400, {"x.png": "1:2:3"}
    state.save()
    assert TrackingState.load(path, "server experiment", 500, print) == state
    assert TrackingState.load(path, "server experiment", 100, print).sent_bytes == 0
    said: list[str] = []
    # Perhaps another name of the same server: what it has is seen there.
    moved = TrackingState.load(path, "elsewhere experiment", 500, said.append)
    assert (moved.run_id, moved.sent_bytes, moved.artifacts) == (RUN_ID, 0, {"x.png": ""})
    assert moved.run_key == state.run_key
    assert "earlier attempts were sent to server experiment, this one goes to elsewhere experiment" in said[0]
    other = TrackingState.load(path, "server trials", 500, said.append)
    assert (other.run_id, other.sent_bytes) == (None, 0) and other.run_key != state.run_key


def test_unreadable_state_is_said_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tracking_state.json"
    path.write_text('{"run_id": "r1", "sen')
    said: list[str] = []
    assert TrackingState.load(path, "server experiment", 0, said.append).run_id is None
    assert str(path) in said[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": ""}, {"run_id": "../../x"}, {"run_key": "a'b"}, {"end": ["WHAT", 1, ""]}, {"started_ms": 10**30},
        {"end": ["FAILED", 10**25, ""]}, {"datasets": {"train": {}}}, {"artifacts": {"a\0b": ""}},
        {"sent_bytes": "x"},
    ],
)  # fmt: skip
def test_a_damaged_state_keeps_its_run(tmp_path: Path, wrong: dict[str, object]) -> None:
    """A second MLflow run beside the first would have all values once more."""
    path = tmp_path / "tracking_state.json"
    state = TrackingState.load(path, "server experiment", 500, print)
    state.run_id = RUN_ID
    state.save()
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    said: list[str] = []
    found = TrackingState.load(path, "server experiment", 500, said.append)
    assert (found.run_id, found.run_key, found.sent_bytes) == (RUN_ID, state.run_key, 0)
    assert f"{path}: unreadable; all is compared" in said[0]


def test_the_same_folder_under_another_path_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    first = TrackingState.load(tmp_path / "here" / "tracking_state.json", "server experiment", 500, print)
    first.run_id, first.home = RUN_ID, f"{tmp_path}/there"  # as a mount at another place would have it
    first.save()
    again = TrackingState.load(tmp_path / "here" / "tracking_state.json", "server experiment", 500, print)
    assert (again.run_id, again.copied_from) == (RUN_ID, "")


def test_only_files_of_the_run_folder_are_sent(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out").symlink_to("/etc/hostname")
    (tmp_path / "run" / "a.png").touch()
    for name, inside in (("a.png", True), ("../x", False), ("/etc/hostname", False), ("out", False), ("a\0b", False)):
        assert is_inside(tmp_path / "run" / name, tmp_path / "run") == inside, name


def test_a_copied_run_folder_becomes_a_run_of_its_own(tmp_path: Path) -> None:
    said: list[str] = []

    def load(name: str) -> TrackingState:
        return TrackingState.load(tmp_path / name / "tracking_state.json", "server experiment", 500, said.append)

    (tmp_path / "first").mkdir()
    first = load("first")
    first.run_id, first.sent_bytes = RUN_ID, 300
    first.save()
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    second = load("second")
    assert (second.run_id, second.sent_bytes) == (None, 0) and second.run_key != first.run_key
    assert second.copied_from == f"{tmp_path}/first, MLflow run {RUN_ID}"
    assert said == [
        f"{tmp_path}/second is a copy of {tmp_path}/first: it goes on as a new MLflow run, whose tag "
        "copied_from names that one"
    ]
    second.save()
    again = load("second")
    assert (again.run_key, again.copied_from) == (second.run_key, second.copied_from) and len(said) == 1
    assert load("first") == first
    (tmp_path / "first").rename(tmp_path / "third")  # moved, not copied
    third = load("third")
    assert (third.run_id, third.sent_bytes, third.copied_from) == (RUN_ID, 300, "") and len(said) == 1
