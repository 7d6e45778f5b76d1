"""Which files a source is made of: globs, links, the home folder; what is no file on this machine is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.corpora import write_jsonl

from biroute.configs.data_section import SourceConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.sources import resolve_files


def files_of(*paths: Path | str) -> list[str]:
    return [file.path for file in resolve_files(SourceConfig(name="s", paths=tuple(map(str, paths))))]


def test_a_file_comes_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "tree" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("text")
    (tmp_path / "tree" / "loop").symlink_to(".")
    (folder / "again.txt").symlink_to("a.txt")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    assert len(files_of(tmp_path / "tree/**/*.txt")) == 1
    assert len(files_of(folder / "a.txt", folder / "again.txt")) == 1
    for number in range(3):  # of which glob would follow all combinations, for longer than any test
        (tmp_path / "tree" / f"up{number}").symlink_to("sub/..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "[b].txt").write_text("text")
    (folder / "link").symlink_to("../../elsewhere")
    for pattern in ("tree/**/*.txt", "**/[[a]*.txt", "tree/**"):
        assert sorted(Path(path).name for path in files_of(tmp_path / pattern)) == ["[b].txt", "a.txt"], pattern


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt is not a regular file"):
        files_of(tmp_path / "*.txt")


@pytest.mark.parametrize("path", ["s3://bucket/a.txt", "https://host/a.jsonl.gz"])
def test_a_url_is_not_on_this_machine(path: str) -> None:
    with pytest.raises(UsageError, match="is not on this machine; copy it first"):
        files_of(path)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert files_of("~/*.txt") == [str(tmp_path / "a.txt")]


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UsageError, match=r"paths: '' is empty; name a file, or take it away"):
        files_of("")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/*.txt", r"matches no file \(.*/nothing: No such file or directory\); correct the path"),
        ("folder/*.txt", "matches no file: the folder .*/folder is empty; put text there, or name another"),
        ("*.txt/a*", r"matches no file: \S+ holds a\.pdf, dangling\.txt, folder; correct the pattern"),
        ("folder", r"is a folder; name its files, such as '.*/folder/\*\.txt'"),
        ("fold*", r"is a folder; name its files, such as '.*/fold\*/\*\.txt'"),
        ("a.pdf", r"a\.pdf: unknown kind of file"),
        ("dangling.txt", r"dangling\.txt"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=message):
        resolve_files(SourceConfig(name="s", paths=(str(tmp_path / name),)))


def test_globs_are_sorted_and_files_come_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        write_jsonl(tmp_path / name, ["x"])
    source = SourceConfig(name="s", paths=(f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt"))
    assert [Path(file.path).name for file in resolve_files(source)] == ["b.txt", "a.txt", "c.txt"]
