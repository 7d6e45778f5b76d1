"""`biroute bench decode`: what it measures is a real step, and its page says what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from biroute.configs.errors import UsageError
from biroute.launcher.bench.decode.measure import LLAMA, VARIANTS, filled_sequence, model_config, run_bench
from biroute.launcher.bench.decode.page import decode_page, findings
from biroute.model.decode.cached_model import CachedModel
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.megatron import groups_of_one


def test_a_filled_sequence_goes_on_like_one_that_was_read() -> None:
    config = model_config(192, "bi_level")
    model = CachedModel(LayerSequence(plan_layers(config, groups_of_one(torch.device("cpu")))), config.model)
    filled, (read, _) = filled_sequence(model, 128), model.prefill([1] * 128)
    assert (filled.length, filled.size_bytes()) == (read.length, read.size_bytes())
    assert model.step([filled], [1]).isfinite().all()
    assert filled.length == 129


def test_every_variant_at_every_length(tmp_path: Path) -> None:
    answer = run_bench([64, 128], steps=1)
    names = {*VARIANTS, LLAMA}
    assert [row["length"] for row in answer["rows"]] == [64, 128]
    assert all(row["variants"].keys() == names for row in answer["rows"])
    assert all(one["token_seconds"] > 0 for row in answer["rows"] for one in row["variants"].values())
    assert all(row["variants"][LLAMA]["generate_token_seconds"] > 0 for row in answer["rows"])
    assert decode_page(answer).write(tmp_path) == [tmp_path / "decode.md", tmp_path / "decode.png"]
    forward = next(part for part in (tmp_path / "decode.md").read_text().split("\n## ") if "forward" in part[:40])
    routed, dense = (answer["rows"][1]["variants"][name] for name in ("routed, fast", "dense, fast"))
    ratios = [f"{routed[what] / dense[what]:.2f}" for what in ("forward_seconds", "prompt_seconds")]
    assert forward.strip().splitlines()[-1].split(" | ")[3:] == [ratios[0], f"{ratios[1]} |"]
    with pytest.raises(UsageError, match="--length=100 is not a multiple of the 64 tokens"):
        run_bench([100], 1)


def row(length: int, *milliseconds: float) -> dict[str, Any]:
    names = [*VARIANTS, LLAMA]
    variants = {n: {"token_seconds": m} for n, m in zip(names, milliseconds, strict=True)}
    variants[LLAMA]["generate_token_seconds"] = milliseconds[-1] + 1.0
    return {"length": length, "variants": variants}


def test_findings_are_ratios_of_the_rows() -> None:
    rows = [row(512, 2.0, 1.5, 1.0, 1.0), row(4096, 2.0, 2.0, 3.0, 4.0), row(65536, 3.0, 2.5, 20.0, 50.0)]
    flat, faster, slower = findings({"rows": rows})
    assert flat == "From 4,096 to 65,536 tokens a routed token takes 1.25 times as long, an exact one 1.50 times."
    assert "At 65,536 tokens the fast one is 8.0 times as fast" in faster and "20.0 times as fast as trans" in faster
    assert slower.endswith(" pass of transformers' Llama at 512 tokens, and than its `generate` nowhere.")
