"""`biroute generate` on a checkpoint that two tensor ranks wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.corpus import small_run

from biroute.launcher.generate.trained import open_trained


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    """The folder of a run of two steps with two tensor ranks, whose dataset is somewhere else now."""
    folder = tmp_path_factory.mktemp("generate")
    tree = small_run(corpus, folder / "run", steps=2, parallel={"tensor": 2, "data": 1})
    tree["tracking"] = {"enabled": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = command("train", folder / "run.yaml")
    assert done.status == 0, done.err
    config = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(config.replace(str(corpus), str(folder / "gone")))
    return folder / "run"


def test_tokens_and_probabilities_are_those_of_the_model_that_was_trained(
    trained: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    """Compared with one forward pass of training over prompt and continuation."""
    prompts = ("Return the", "床前 a longer prompt than that")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    done = command(
        "generate", trained, "--prompts", tmp_path / "prompts.jsonl", "--temperature", 0, "--max-tokens", 25, "--json"
    )
    assert done.status == 0, done.err
    answer = json.loads(done.out)
    assert answer["step"] == 2 and len(answer["texts"]) == 2
    model = open_trained(trained)
    for text, prompt in zip(answer["texts"], prompts, strict=True):
        begun, ids = model.tokenizer.encode(prompt), [token["id"] for token in text["tokens"]]
        assert text["prompt_tokens"] == len(begun) and text["text"] == model.tokenizer.decode(ids)
        whole = [*begun, *ids]
        with torch.no_grad():
            logits = model.model.layers(torch.tensor([whole + [0] * (-len(whole) % 8)]))[:, 0]
        expected = logits[len(begun) - 1 : len(whole) - 1, : model.tokenizer.vocab_size].log_softmax(-1)
        assert expected.argmax(-1).tolist() == ids
        found = torch.tensor([token["log_probability"] for token in text["tokens"]])
        torch.testing.assert_close(found, expected.gather(1, torch.tensor(ids)[:, None])[:, 0], atol=1e-4, rtol=0)
