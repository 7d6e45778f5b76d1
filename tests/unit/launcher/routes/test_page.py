"""The page and the JSON: the same numbers, and nothing of a text can act in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cached import VOCABULARY, cached_model, tiny_config
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.routes import routes_app
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.routes.command import Request, make_report
from biroute.launcher.routes.page import page
from biroute.launcher.routes.report import pieces

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- <script> @DATA@ @SCRIPT_HASH@ &lt; 床"


class Utf8:
    """Token n is the byte n."""

    vocab_size, eos_id = VOCABULARY, 300

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


def report(text: str, said: list[str] | None = None, max_tokens: int | None = None) -> dict[str, Any]:
    config = tiny_config({"sequence_length": 160, "dense_layers": [0]})
    trained: Any = SimpleNamespace(
        config=config, tokenizer=Utf8(), model=cached_model(config), checkpoint=Path("run/step-00000003"),
        meta=SimpleNamespace(progress=SimpleNamespace(step=3)),
    )  # fmt: skip
    request = Request(ModelChoice(Path("run")), text, "a<b>.txt", max_tokens=max_tokens, as_json=True)
    return make_report(request, trained, (said if said is not None else []).append)


class Elements(HTMLParser):
    """The elements of a page, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def test_a_text_with_scripts_is_harmless_and_comes_back_whole() -> None:
    made = report(ATTACK)
    parsed, plain = Elements(), Elements()
    parsed.feed(page(made))
    plain.feed(page(report("a")))
    assert [tag for tag, _ in parsed.found] == [tag for tag, _ in plain.found]
    data, script = parsed.scripts
    assert json.loads(data) == made, "the page has the numbers of --json"
    assert "".join(made["pieces"]) == ATTACK
    assert not set("<>&") & set(data) and data.isascii()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [one["content"] for tag, one in parsed.found if tag == "meta" and "http-equiv" in one]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "innerHTML" not in script and "document.write" not in script


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page(report("a"))
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)


def test_a_character_of_three_tokens_stands_at_its_last() -> None:
    tokenizer: Any = Utf8()
    assert pieces(list("a床".encode()), tokenizer) == ["a", "", "", "床"]
    assert pieces([*b"a", *"床".encode()[:2]], tokenizer) == ["a", "", "\ufffd"]
    assert pieces(list("\x1b\n\u202e".encode()), tokenizer) == ["\\x1b", "\n", "", "", "\\u202e"]


def test_a_text_that_is_too_long_is_cut_and_that_is_said() -> None:
    said: list[str] = []
    made = report("x" * 200, said)
    assert len(made["tokens"]) == 160 and made["tokens_of_text"] == 200 and made["num_regions"] == 20
    assert said == [
        "a<b>.txt: only the first 160 of its 200 tokens are shown (as many as the model's sequences have)"
    ]
    made = report("x" * 200, said, max_tokens=21)
    assert len(made["pieces"]) == 21 and made["num_regions"] == 3
    assert said[1:] == ["a<b>.txt: only the first 21 of its 200 tokens are shown (--max-tokens)"]
    assert report("x" * 160, said) and len(said) == 2
    dense, routed = made["layers"]
    assert (dense["kind"], dense["measures"], dense["heads"]) == ("dense", None, [])
    assert [len(head["routes"]) for head in routed["heads"]] == [21, 21] and routed["heads"][0]["routes"][0] == [0]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "text.txt: the file is empty; give a text"),
        (b"ab\xff", [], "text.txt: not UTF-8 (byte 0xff at position 3); convert the file to UTF-8"),
        (None, [], "text.txt: No such file or directory; name a text file"),
        (b"a", ["--max-tokens", "0"], "--max-tokens=0 is out of range; use at least 1"),
        (b"a", ["--precision", "fp8"], "--precision=fp8 is unknown; use fp32 or bf16"),
        (b"a", ["--out", "nowhere/page.html"], "--out=nowhere/page.html: there is no folder nowhere; make it"),
        (b"a", [], "no-run has no folder checkpoints"),
    ],
)
def test_bad_input_is_a_usage_error(
    content: bytes | None, arguments: list[str], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    done = CliRunner().invoke(routes_app, ["no-run", "--text", str(tmp_path / "text.txt"), *arguments])
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
