"""`biroute ui`: what it refuses, and what others on the machine can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.track.mlflow_ui import check_port, server_command, server_environment


def test_ui_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a server already"):
        server_command("http://server:5055", 5055)
    with pytest.raises(UsageError, match=r"mlflow\.db: no MLflow database there yet; .*set tracking\.uri"):
        server_command(f"sqlite:///{tmp_path}/new/mlflow.db", 5055)
    assert not list(tmp_path.iterdir()), "what only reads makes no folder"
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
