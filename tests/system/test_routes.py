"""`biroute routes` on a checkpoint that two tensor ranks wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import open_trained
from biroute.launcher.routes.record import read_routes


def test_the_page_and_the_json_have_the_routes_of_the_model(
    trained: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    text = "Return the <script>alert(1)</script> 床前明月光 of a file. " * 9
    (tmp_path / "text.txt").write_text(text)
    done = command("routes", trained, "--text", tmp_path / "text.txt", "--json", "--out", tmp_path / "page.html")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', (tmp_path / "page.html").read_text()
    )
    assert json.loads(data) == found
    model = open_trained(ModelChoice(trained))
    tokens = model.tokenizer.encode(text)
    assert found["tokens_of_text"] == len(tokens) and found["tokens"] == tokens[: len(found["tokens"])]
    assert (len(found["tokens"]) < len(tokens)) == ("only the first" in done.err)
    assert text.startswith("".join(found["pieces"]))
    for one, expected in zip(found["layers"], read_routes(model.model, found["tokens"]), strict=True):
        assert expected.route is not None
        routes = [[[region for region in route if region >= 0] for route in head] for head in expected.route.tolist()]
        assert [head["routes"] for head in one["heads"]] == routes
