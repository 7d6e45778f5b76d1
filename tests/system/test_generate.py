"""`biroute generate` on a checkpoint that two tensor ranks wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.generate.trained import open_trained


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
    model = open_trained(ModelChoice(trained))
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
