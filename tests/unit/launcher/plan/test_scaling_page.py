"""docs/benchmarks/scaling.md: a row computed anew stands on the page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def test_the_page_is_up_to_date() -> None:
    """The smallest sizes only: the whole page takes half a minute."""
    spec = importlib.util.spec_from_file_location("write_scaling_page", ROOT / "docs" / "write_scaling_page.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "benchmarks" / "scaling.md").read_text(encoding="utf-8")
    assert page.startswith(script.INTRODUCTION.strip())
    assert page.endswith(script.READING)
    for kind in script.ATTENTION:
        first = script.best(kind, 8)
        assert script.row(8, first, first) in page, "run make docs"
        assert script.row(16, script.best(kind, 16), first) in page, "run make docs"
