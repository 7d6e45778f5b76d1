"""Every folder of Python is packaged, in the import contract and in the picture; the guides name real files."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from biroute.configs.code_folders import PARTS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folders() -> set[str]:
    found = {path.parent for part in PARTS for path in (ROOT / part).rglob("*.py")}
    return {".".join(folder.relative_to(ROOT).parts) for folder in found}


def test_every_folder_is_packaged() -> None:
    assert {name.removeprefix("biroute.") for name in PROJECT["setuptools"]["packages"]} == folders()
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in folders())


def test_every_folder_is_in_the_import_contract() -> None:
    """Each package is a layer of the first contract, or lies in one."""
    layers = [one for layer in PROJECT["importlinter"]["contracts"][0]["layers"] for one in layer.split(" | ")]
    for folder in folders() - {"launcher"}:  # which holds nothing but rooms
        assert any(f"biroute.{folder}" == layer or f"biroute.{folder}".startswith(f"{layer}.") for layer in layers), (
            folder
        )
    assert set(PROJECT["importlinter"]["root_packages"]) == {f"biroute.{part}" for part in PARTS}


def test_the_picture_of_the_packages_is_up_to_date_and_holds_every_room() -> None:
    drawing = script("draw_packages")
    rooms = drawing.rooms()
    assert sorted(room for floor in drawing.floors(rooms) for room in floor) == sorted(rooms)
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.draw(), "run make docs"


def test_the_picture_of_a_run_is_up_to_date_and_follows_the_imports() -> None:
    drawing = script("draw_run")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.draw(), "run make docs"
    drawing.PROCESSES = {"a process": ("launcher.cli.main", "model.block")}
    with pytest.raises(ValueError, match=r"main neither imports nor starts model\.block"):
        drawing.draw()


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", "docs/architecture.md", "docs/testing.md", "README.md"])
def test_the_guides_name_files_that_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    names = re.findall(r"`((?:configs|model|parallel|data_pipeline|launcher|slurm|tests|docs)/[\w./-]*)`", text)
    names += re.findall(r"\]\(((?!http)[\w./-]+)\)", text)
    assert names
    folder = (ROOT / guide).parent
    missing = [name for name in names if not ((ROOT / name).exists() or (folder / name).exists())]
    assert not missing
