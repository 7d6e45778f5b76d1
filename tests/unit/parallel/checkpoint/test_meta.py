"""meta.json comes from a disk: whatever stands in it, it is read as it was written, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biroute.configs.errors import UsageError
from biroute.parallel.checkpoint.meta import read_meta

FILES = [f"weights-pipe00-tensor{rank:02d}-part00.pt" for rank in range(2)]


def content() -> dict[str, Any]:
    return {
        "format": 1,
        "progress": {"step": 3, "sequences": 24},
        "about": {"model": {"model.hidden_size": 32}},
        "files": {file: {"bytes": 10, "sha256": "0" * 64} for file in FILES},
        "parameters": {
            "cut": {"files": {"0": FILES[0], "1": FILES[1]}, "split": [0, 1]},
            "whole": {"files": {"0": FILES[0]}, "split": None},
        },
    }


def rename(meta: dict[str, Any], name: str) -> None:
    """Everywhere, so that only the name itself is wrong."""
    meta["files"][name] = meta["files"].pop(FILES[0])
    meta["parameters"]["cut"]["files"]["0"] = meta["parameters"]["whole"]["files"]["0"] = name


def test_a_sound_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(content()))
    meta = read_meta(tmp_path)
    assert (meta.progress.step, meta.progress.evaluation_pending) == (3, False)
    assert meta.parameters["cut"].files == dict(enumerate(FILES))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model": (lambda meta: meta["about"].clear(), "about.model is missing"),
    "a model that is none": (lambda meta: meta["about"].update(model=[]), "about.model is missing"),
    "no progress": (lambda meta: meta.pop("progress"), "progress"),
    "a step below 0": (lambda meta: meta["progress"].update(step=-1), "progress.step"),
    "half a step": (lambda meta: meta["progress"].update(step=2.5), "progress.step"),
    "a file without checksum": (lambda meta: meta["files"].pop(FILES[1]), "no checksum"),
    "an absolute name": (lambda meta: rename(meta, "/etc/passwd"), "files"),
    "a name above": (lambda meta: rename(meta, f"../{FILES[0]}"), "files"),
    "a name in a folder": (lambda meta: rename(meta, f"x/{FILES[0]}"), "files"),
    "a name with a line": (lambda meta: rename(meta, f"{FILES[0]}\n"), "files"),
    "no files of a parameter": (lambda meta: meta["parameters"]["cut"]["files"].clear(), "cut.files"),
    "a lost tensor rank": (lambda meta: meta["parameters"]["cut"]["files"].pop("0"), "tensor ranks"),
    "a size below 0": (lambda meta: meta["files"][FILES[0]].update(bytes=-1), "bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, tmp_path: Path) -> None:
    edit, message = DAMAGE[kind]
    meta = content()
    edit(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        read_meta(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 200_000, '{"format": 1, "about": ' + "[" * 200_000])
def test_anything_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="validation error"):
        read_meta(tmp_path)


def test_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"format": 2}')
    with pytest.raises(UsageError, match="checkpoint format 2, this BiRoute reads 1"):
        read_meta(tmp_path)
