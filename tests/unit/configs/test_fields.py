"""Every setting has a test that shows that it reaches what it configures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.fields import SHOWN_BY, all_fields

TESTS = Path(__file__).resolve().parents[2]


def test_every_setting_has_its_test() -> None:
    assert sorted(SHOWN_BY) == sorted(path for path, _, _ in all_fields())


@pytest.mark.parametrize("path", SHOWN_BY)
def test_its_test_exists_and_names_it(path: str) -> None:
    """That it fails without the setting is what `make mutate` tries."""
    file, _, test = SHOWN_BY[path].partition("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert not test or test.partition("[")[0] in names
    assert re.search(rf"\b{path.rpartition('.')[2]}\b", source), f"{file} does not name {path}"
