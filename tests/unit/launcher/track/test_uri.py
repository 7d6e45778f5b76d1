"""Tracking URIs: which are refused, what is shown of them, and where people see a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.messages import printable_json, without_password
from biroute.launcher.track import run_metadata
from biroute.launcher.track.uri import absolute_uri, experiment_name, run_page, sqlite_path, tracking_uri


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


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_database_that_cannot_be_written_is_refused(folder: str) -> None:
    """Not even by root, whom `os.access` allows everything."""
    config = config_from_tree({"tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}, "test")
    with pytest.raises(UsageError, match=r"mlflow\.db cannot be written; name a file in a writable folder"):
        tracking_uri(config, Path("run"))


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
