"""The whole system learns: after seconds of training it knows held-out text better than a bigram model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run

from .conftest import Answer


@pytest.mark.slow
def test_a_small_model_beats_a_bigram(corpus: Path, tmp_path: Path, command: Callable[..., Answer]) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=200, parallel={})
    tree["model"] |= {"hidden_size": 64, "sequence_length": 128, "qk_norm": True, "init_std": 0.08}
    tree["optim"] = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 20}
    tree["train"] |= {"global_batch_size": 8, "microbatch_size": 8, "evaluate_every": 0, "evaluate_sequences": 32}
    tree["checkpoint"] = {"every_steps": 0}
    config = tmp_path / "learn.yaml"
    config.write_text(yaml.safe_dump(tree))
    bigram = command("data", "bigram", config, "--json")
    assert bigram.status == 0, bigram.err
    trained = command("train", config)
    assert trained.status == 0, trained.err
    points = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (heldout,) = [point["heldout/bits_per_byte"] for point in points if "heldout/bits_per_byte" in point]
    # 2.69 against 3.09 when this was written
    assert 1.0 < heldout < json.loads(bigram.out)["bits_per_byte"] - 0.2
