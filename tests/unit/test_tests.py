"""Every test can fail: it asserts, expects an error, or calls a helper that does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ASSERTING = ("assert", "raises", "fail", "check_", "wait_for", "until")


def checks(node: ast.AST, helpers: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Does a function assert anything, itself or in a helper of its module?"""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            name = ast.unparse(inner.func).split(".")[-1]
            if name.startswith(ASSERTING):
                return True
            if name in helpers and name not in seen and checks(helpers[name], helpers, seen | {name}):
                return True
    return False


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_asserts_nothing(path: Path) -> None:
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    helpers = {function.name: function for function in functions if not function.name.startswith("test_")}
    silent = [one.name for one in functions if one.name.startswith("test_") and not checks(one, helpers)]
    assert not silent
