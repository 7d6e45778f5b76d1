"""What every benchmark writes: a page and its pictures."""

from __future__ import annotations

from pathlib import Path

from biroute.launcher.bench.report import Findings, Page, Picture, Table


def test_a_page_and_each_of_its_pictures(tmp_path: Path) -> None:
    def draw(name: str) -> Picture:
        return Picture(name, lambda path: path.write_text(name) and None)

    table = Table("Speeds", ["path", "ms"], [["dense", "2"], ["tiles", "1"]])
    parts = ["Some words.", draw("first"), table, draw("second"), Findings(["tiles win"])]
    written = Page("speeds", "# Speeds", {"machine": "this one", "command": "bench"}, parts).write(tmp_path / "new")
    assert [path.name for path in written] == ["speeds.md", "speeds.png", "speeds-2.png"]
    assert [path.read_text() for path in written[1:]] == ["first", "second"]
    assert written[0].read_text().split("\n\n") == [
        "# Speeds",
        "- machine: this one\n- command: `bench`",
        "Some words.",
        "![first](speeds.png)",
        "## Speeds",
        "| path | ms |\n| --- | --: |\n| dense | 2 |\n| tiles | 1 |",
        "![second](speeds-2.png)",
        "- tiles win\n",
    ]
