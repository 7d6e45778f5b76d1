"""The parts of tracking that need no server: metrics_log, state, URI checks, run_metadata."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.messages import printable_json, without_password
from biroute.launcher.track import run_metadata as run_metadata
from biroute.launcher.track.artifact_uploader import is_inside
from biroute.launcher.track.metrics_log import MetricsLog, read_points, scan
from biroute.launcher.track.mlflow_ui import check_port, server_command, server_environment
from biroute.launcher.track.upload_state import TrackingState
from biroute.launcher.track.uploader import next_batch
from biroute.launcher.track.uri import absolute_uri, experiment_name, run_page, sqlite_path, tracking_uri

RUN_ID = "0123456789abcdef" * 2

# ---- metrics_log ----


def test_spool_keeps_every_value_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 0.1, "b": float("nan"), "c": float("inf"), "d": float("-inf"), "损失": 2.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    (point,) = read_points(path)
    assert point.step == 1
    assert str(point.metrics) == "{'a': 0.1, 'b': nan, 'c': inf, 'd': -inf, '损失': 2.0}"


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b"\x00" * 100_000, b"\xff\xfe", b'{"step": 3}'])
def test_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, {"a": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read_points(path)) == 1
    metrics_log = MetricsLog(path)
    assert path.read_bytes() == whole
    assert metrics_log.size_bytes == len(whole)
    metrics_log.append(2, {"a": 2.0})
    assert [point.step for point in read_points(path)] == [1, 2]


def test_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, {"a": 1.0})
    path.write_bytes(path.read_bytes()[:-1])
    metrics_log = MetricsLog(path)
    assert not metrics_log.append(1, {"a": 5.0})
    assert metrics_log.size_bytes == path.stat().st_size
    assert [point.metrics for point in read_points(path)] == [{"a": 1.0}]


def test_damaged_line_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "metrics": []}\n')
    MetricsLog(path).append(3, {"a": 3.0})
    assert [point.step for point in read_points(path)] == [1, 3]
    assert [end for _, end in scan(path)][-1] == path.stat().st_size


def test_repeated_step_keeps_its_first_value_and_takes_new_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(10, {"loss": 1.0})
    again = MetricsLog(path)
    assert not again.append(10, {"loss": 2.0})
    assert again.append(10, {"loss": 2.0, "heldout": 3.0})
    assert [point.metrics for point in read_points(path)] == [{"loss": 1.0}, {"heldout": 3.0}]


def test_full_disk_delays_points_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel writes the first ten bytes of the line and then refuses, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics_log.size_bytes + 10, hard))
    try:
        with pytest.raises(OSError, match="only 10 of"):
            metrics_log.append(2, {"a": 2.0})
        with pytest.raises(OSError, match="only 10 of"):
            metrics_log.append(3, {"a": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == metrics_log.size_bytes
    metrics_log.append(4, {"a": 4.0})
    assert [point.step for point in read_points(path)] == [1, 2, 3, 4]


def test_batches_cover_the_spool_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    for step in range(700):
        metrics_log.append(step, {"a": 1.0, "b": 2.0, "c": 3.0})
    steps, end, batches = [], 0, 0
    while end < metrics_log.size_bytes:
        points, end = next_batch(path, end)
        assert 0 < sum(len(point.metrics) for point in points) <= 1000
        steps += [point.step for point in points]
        batches += 1
    assert steps == list(range(700))
    assert batches == 3
    assert next_batch(path, end) == ([], end)


# ---- state ----


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


# ---- URI ----


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("localhost:5055", "did you mean http://localhost:5055?"),
        ("./mlruns", "a folder or file path"),
        ("file:///tmp/mlruns", "unsupported scheme 'file'"),
        ("ftp://server/x", "unsupported scheme 'ftp'"),
        ("http://", "no host"),
        ("http://server:port", "Port could not be cast"),
        ("http://server:99999", "Port out of range"),
        ("http://my server:5000", "blanks"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://server:5000/#/experiments/1", "the address of a page; use the part before the #"),
        ("databricks", "Databricks is not supported"),
        ("databricks://profile", "Databricks is not supported"),
        ("postgresql://db/x", "`pip install psycopg2-binary`"),
        ("postgresql+psycopg2://db/x", "`pip install psycopg2-binary`"),
        ("mysql+pymysql://db/x", "`pip install pymysql`"),
        ("mssql://db/x", "`pip install pyodbc`"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://mlflow.db", "names no file"),
        ("sqlite:////", "names no file"),
    ],
)
def test_hopeless_uri_is_refused_in_one_line(uri: str, message: str, tmp_path: Path) -> None:
    config = config_from_tree({"tracking": {"uri": uri}}, "test")
    with pytest.raises(UsageError) as caught:
        tracking_uri(config, tmp_path / "run")
    assert str(caught.value).startswith(f"tracking.uri={uri}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but a text of some length")
    with pytest.raises(UsageError, match=r"mlflow\.db is not an SQLite file"):
        tracking_uri(config_from_tree({}, "test"), tmp_path / "run")


def test_default_uri_is_shared_by_the_runs_of_a_folder(tmp_path: Path) -> None:
    config = config_from_tree({}, "test")
    uris = {tracking_uri(config, tmp_path / name) for name in ("a", "b")}
    assert uris == {f"sqlite:///{tmp_path}/mlflow.db"}
    assert sqlite_path(uris.pop()) == tmp_path / "mlflow.db"


def test_a_database_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the system is asked in a way that answers as for a user.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"mlflow\.db cannot be written; name a file in a writable folder"):
        tracking_uri(config_from_tree({}, "test"), tmp_path / "run")


def test_the_configuration_comes_before_mlflows_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "poems")
    unset, given = (
        config_from_tree({"tracking": tree}, "test") for tree in ({}, {"uri": "http://a", "experiment": "b"})
    )
    assert (tracking_uri(unset, tmp_path / "run"), experiment_name(unset)) == ("http://team:5000", "poems")
    assert (tracking_uri(given, tmp_path / "run"), experiment_name(given)) == ("http://a", "b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "team:5000")
    with pytest.raises(UsageError, match=r"^MLFLOW_TRACKING_URI=team:5000: "):
        tracking_uri(unset, tmp_path / "run")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "x" * 300)
    with pytest.raises(UsageError, match=r"has 300 characters, its database holds 256; shorten tracking\.experiment"):
        experiment_name(unset)


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("http://me:secret@host:5000", "http://host:5000/#/experiments/1/runs/r?workflowType=machine_learning"),
        ("https://host/a/b/", "https://host/a/b/#/experiments/1/runs/r?workflowType=machine_learning"),
        ("sqlite:////x/mlflow.db", "`biroute ui runs/x/config.yaml` shows it"),
    ],
)
def test_where_people_see_a_run(uri: str, page: str) -> None:
    assert run_page(uri, "1", "r", Path("runs/x")) == page


def test_a_relative_database_is_made_absolute() -> None:
    assert absolute_uri("sqlite:///x.db", Path("/a")) == "sqlite:////a/x.db"
    for uri in ("", "sqlite:////b/x.db", "http://host:5000"):
        assert absolute_uri(uri, Path("/a")) == uri


@pytest.mark.parametrize("name", ["what?", "a%41b"])
def test_a_folder_that_an_sqlite_uri_cannot_name(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / name / "run"
    with pytest.raises(UsageError, match=r"has a meaning in its URI; choose another folder, or set tracking\.uri"):
        tracking_uri(config_from_tree({}, "test"), run_dir)
    given = {"tracking": {"uri": "http://host:5000"}}
    assert tracking_uri(config_from_tree(given, "test"), run_dir) == "http://host:5000"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@server:5055/path", "http://me:***@server:5055/path"),
        ("postgresql+psycopg2://you:s:ec@ret@db/x", "postgresql+psycopg2://you:***@db/x"),
        ("http://:secret@server", "http://:***@server"),
        ("https://t0ken-secret@server/x", "https://***@server/x"),
        (
            "postgresql://db/x?user=me&password=secret&sslmode=require",
            "postgresql://db/x?user=me&password=***&sslmode=require",
        ),
        ("http://server/?ACCESS_TOKEN=secret#top", "http://server/?ACCESS_TOKEN=***#top"),
        ("http://server/?sslpassword=secret", "http://server/?sslpassword=***"),
        ("mssql://db/x;pwd=secret;y=1", "mssql://db/x;pwd=***;y=1"),
        ("uri: 'http://me:secret@a' and http://you:secret@b", "uri: 'http://me:***@a' and http://you:***@b"),
        ("http://server:5000/path/a@b and mail@me.org", "http://server:5000/path/a@b and mail@me.org"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_passwords_and_tokens_are_masked(text: str, shown: str) -> None:
    assert without_password(text) == shown
    assert without_password(shown) == shown


def test_json_that_is_shown_is_json_and_commands_no_terminal() -> None:
    text = "诗\x1b]52;c\x07 \x7f\x9b2J \u202etxt\n\ud83d\ude00"
    shown = printable_json({"text": text})
    assert json.loads(shown) == {"text": text} and "诗" in shown
    assert not set(shown) & set("\x1b\x07\x7f\x9b\u202e")


def test_passwords_are_not_shown() -> None:
    config = config_from_tree({"tracking": {"uri": "http://me:secret@server:99999"}}, "test")
    with pytest.raises(UsageError) as caught:
        tracking_uri(config, Path("run"))
    assert "secret" not in str(caught.value)
    assert not any("secret" in value for value in run_metadata.parameters(config).values())
    assert not any("secret" in value for value in run_metadata.placement_tags(config).values())


# ---- user interface ----


def test_ui_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a server already"):
        server_command("http://server:5055", 5055)
    with pytest.raises(UsageError, match=r"mlflow\.db: no MLflow database there"):
        server_command(f"sqlite:///{tmp_path}/mlflow.db", 5055)
    with pytest.raises(UsageError, match="port 99999 is out of range"):
        check_port("127.0.0.1", 99999)
    with pytest.raises(UsageError, match=r"use 127\.0\.0\.1 or"):
        check_port("192.0.2.1", 5055)  # an address reserved for documentation: no machine has it


def test_what_is_served_is_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on the machine can read it, and the URI of a database may hold a password."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:///another.db")
    (tmp_path / "mlflow.db").touch()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert uri not in " ".join(server_command(uri, 5055))
    assert server_environment(uri)["MLFLOW_BACKEND_STORE_URI"] == uri


# ---- run_metadata ----


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
