"""`biroute bench gpu` in Triton's interpreter: rows of real work, parts that make the whole, a page that tells."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cached import cached_model, random_tokens, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.configs.schema import TrainConfig
from biroute.launcher.bench import several_processes
from biroute.launcher.bench.commands import bench_app
from biroute.launcher.bench.gpu import llama, measure, routes
from biroute.launcher.bench.gpu.layer import Inputs, Layer, compared
from biroute.launcher.bench.gpu.page import gpu_page
from biroute.launcher.bench.gpu.parts import parts_of, whole_attention
from biroute.launcher.bench.gpu.targets import STEP_VOCABULARY, TARGETS
from biroute.launcher.routes.record import read_routes
from biroute.model.attention.partial import merge_partials, partial_attention

CPU = torch.device("cpu")
LLAMA_CONFIG = tiny_config({"sequence_length": 64, "attention": {"kind": "dense"}})
LLAMA = LLAMA_CONFIG.model
SMALL = Layer(num_heads=2, num_kv_heads=1, head_size=16, region_size=16, topk=2, dtype=torch.float32)


def test_every_row_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route = torch.tensor([[[[0, -1], [0, 1], [0, 2], [1, 3]]]], dtype=torch.int32)
    trained = {1: route.repeat_interleave(16, 2), 16: route}
    arguments: dict[str, Any] = {"layer": SMALL, "step_model": None, "rows": tmp_path / "rows.jsonl"}
    answer = measure.run_bench(CPU, [64], 1, routes=trained, **arguments)
    names = [(row["routes"], row["block"]) for row in answer["layers"]]
    assert names == [("trained", 1), ("random", 1), ("trained", 16), ("random", 16)]
    assert [(row["block"], row["ranks"]) for row in answer["parts"]] == [(1, 4), (16, 4)]
    seconds = [value for row in answer["layers"] for name, value in row.items() if name.endswith("_seconds")]
    assert len(seconds) == 4 * 6 and min(seconds) > 0
    inputs = Inputs.draw(SMALL, 64, CPU)
    for row in answer["layers"]:
        assert min(row["peak_bytes"], row["dense_peak_bytes"]) > inputs.held_bytes
        assert row["tensor_bytes"] == 2 * 4 * 16 * 64 * (2 + 1 + 1 + 2) + 2 * 64 * 4

    def fail(*_: Any, **__: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    for name in ("measure_layer", "measure_parts"):
        monkeypatch.setattr(measure, name, fail)
    again = measure.run_bench(CPU, [64], 1, routes=trained, **arguments)
    assert (again["layers"], again["failed"]) == (answer["layers"], [])
    failing = measure.run_bench(CPU, [64], 1, layer=SMALL, step_model=None)
    assert failing["layers"] == failing["parts"] == [] and len(failing["failed"]) == 4
    assert "OutOfMemoryError: CUDA out of memory. Tried" in failing["failed"][0]
    assert f"- failed: {failing['failed'][0]}" in gpu_page(failing).write(tmp_path)[0].read_text()


def test_training_steps_get_the_beginning_of_the_trained_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    route = torch.arange(2 * 8 * 2, dtype=torch.int32).view(1, 2, 8, 2)
    trained = {1: route.repeat_interleave(16, 2), 16: route}
    given: list[tuple[int, dict[int, torch.Tensor]]] = []

    def steps(now: Any, repeats: int, model: Any, layer: Layer, device: Any, routes: Any) -> list[Any]:
        given.append((model.sequence_length, routes))
        return []

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError  # what else is measured does not matter here

    for name in ("measure_layer", "measure_parts", "llama_steps"):
        monkeypatch.setattr(measure, name, fail)
    monkeypatch.setattr(measure, "measure_steps", steps)
    for routes_of_bench in (trained, None):
        measure.run_bench(CPU, [128, 64], 1, routes=routes_of_bench, layer=SMALL, step_model=LLAMA)
    assert [length for length, _ in given] == [64, 128, 64, 128]
    for length, routes_of_steps in given[:2]:
        for block in (1, 16):
            assert torch.equal(routes_of_steps[block], trained[block][:, :, : length // block])
    assert [routes_of_steps for _, routes_of_steps in given[2:]] == [{}, {}]


def test_the_parts_of_region_ranks_make_the_whole() -> None:
    inputs = Inputs.draw(SMALL, 128, CPU)
    whole = whole_attention(inputs, SMALL, 1)
    parts = parts_of(whole, 4)
    assert len(parts) == 4 + 3, "own regions of each rank, and what all but the first fetch"
    found = []
    for rank in range(4):
        of_rank = [part for part in parts if torch.equal(part.q, whole.q[:, :, 32 * rank : 32 * (rank + 1)])]
        outs, lses = zip(*(partial_attention(p.q, p.k, p.v, p.route, p.grid) for p in of_rank), strict=True)
        found.append(merge_partials(list(outs), list(lses)))
    out, lse = (torch.cat(side, 2) for side in zip(*found, strict=True))
    expected = partial_attention(whole.q, whole.k, whole.v, whole.route, whole.grid)
    assert torch.allclose(out, expected[0], atol=1e-5) and torch.allclose(lse, expected[1], atol=1e-5)
    assert torch.equal(whole.lse, expected[1])


def test_targets_are_ratios_of_rows(tmp_path: Path) -> None:
    row = {
        "routes": "trained", "tokens": 131_072, "block": 1, "dense_forward_seconds": 0.26,
        "dense_backward_seconds": 0.62, "route_seconds": 0.013, "route_of_one_seconds": 0.01,
        "forward_seconds": 0.026, "backward_seconds": 0.061, "peak_bytes": 13, "dense_peak_bytes": 20,
        "tensor_bytes": 10, "kernels": {"route_blocks": {"launches": 2, "seconds": 0.02}},
    }  # fmt: skip
    one = compared(row)
    assert one.forward == pytest.approx(0.26 / 0.039) and one.both == pytest.approx(8.8)
    assert one.descriptors == pytest.approx(100 / 97) and one.router == pytest.approx(0.13)
    assert (one.memory, one.memory_of_dense) == (1.3, 0.65)
    of_random = row | {"routes": "random", "forward_seconds": 0.5}
    targets = measure._targets([row, of_random])
    assert [target["met"] for target in targets] == [True, False, True, True, True, True]
    assert targets[0]["asked"] == ">= 5" and targets[0]["random"] == pytest.approx(0.26 / 0.513)
    assert len(TARGETS) == 14, "all that docs/benchmarks/gpu_on_paper.md compares"
    answer = {
        "environment_info": {}, "settings": {}, "targets": targets, "parts": [], "failed": [],
        "layers": [row | {"compared": vars(one)}],
        "train_steps": [{"name": "dense", "num_layers": 4, "hidden_size": 8, "num_tokens": 64, "seconds": 0.5,
                         "routes": None, "tokens_per_second": 128.0, "ratio": 1.0, "target": None},
                        {"name": "one route per token", "num_layers": 4, "hidden_size": 8, "num_tokens": 64,
                         "seconds": 0.25, "routes": "trained", "tokens_per_second": 256.0, "ratio": 2.0,
                         "target": 2.0}],
    }  # fmt: skip
    text = gpu_page(answer).write(tmp_path)[0].read_text()
    assert "| forward + backward | 131,072 | 1 | >= 9 | 8.80 | 1.53 | no |" in text
    assert "| route_blocks | trained | 131,072 | 1 | 2 | 20.00 |" in text
    assert "| dense | – | 64 | 500.0 | 128 | 1.00 | – |" in text
    assert "| one route per token | trained | 64 | 250.0 | 256 | 2.00 | 2 |" in text


def test_routes_of_a_trained_model_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = cached_model(tiny_config()), random_tokens(48)
    tokenizer = SimpleNamespace(encode=lambda text: tokens[: len(text)])
    monkeypatch.setattr(routes, "open_trained", lambda _: SimpleNamespace(model=model, tokenizer=tokenizer))
    (tmp_path / "text").write_text("x" * 48)

    def chosen(length: int = 48, **changes: int) -> dict[int, torch.Tensor]:
        sizes = {"region_size": 8, "topk": 4, "heads": 3} | changes
        return routes.trained_routes(Path("run"), tmp_path / "text", length, (1, 8), **sizes)

    expected = torch.cat([one.route for one in read_routes(model, tokens) if one.route is not None])
    found = chosen()
    assert torch.equal(found[1][0], expected[:3].int())
    assert found[8].shape == (1, 3, 6, 4)
    for changes, message in (({"length": 49}, "48 tokens; a text of 49"), ({"region_size": 4}, "no regions of 4"),
                             ({"heads": 5}, "4 key/value heads in all layers; 5 are needed")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            chosen(**changes)


def test_llama_has_the_sizes_of_our_model() -> None:
    """Its operations are those of our dense model's matrices: 6 for each weight and token, attention not counted."""
    with FlopCounterMode(display=False) as counter:
        row = measure._llama(LLAMA, CPU, 1, False)["rows"][0]
    ours = dict(cached_model(LLAMA_CONFIG).layers.named_weights())
    blocks = sum(weight.numel() for name, weight in ours.items() if weight.dim() > 1 and "embedding" not in name)
    products = counter.get_flop_counts()["Global"]
    assert sum(products.values()) == 3 * 6 * 64 * (blocks + STEP_VOCABULARY * LLAMA.hidden_size)  # tied embeddings
    assert row["num_tokens"] == 64 and row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
    faster, dense = row | {"name": "faster", "seconds": 1.0}, row | {"name": "dense", "seconds": 2.0}
    assert [one["ratio"] for one in measure._compared_with_dense([dense, faster])] == [1.0, 2.0]
    assert measure._compared_with_dense([faster]) == []


def test_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UsageError, match="sees no GPU here; biroute bench attention"):
        CliRunner().invoke(bench_app, ["gpu"], catch_exceptions=False)
    with pytest.raises(UsageError, match=re.escape("--length 8200 is no multiple of 256 tokens; use 8192")):
        measure.check_lengths([8200])
    llama.check_installed()
    monkeypatch.setattr(llama, "version", lambda name: "4.57.1")
    with pytest.raises(
        UsageError, match=r"finds 4\.57\.1; install it with `pip install 'transformers>=5,<6'`, or use"
    ):
        llama.check_installed()
    assert measure.routes_of_run(None, None, 64) is None
    with pytest.raises(UsageError, match="--run and --text belong together"):
        measure.routes_of_run(tmp_path, None, 64)


def test_a_benchmark_of_the_cpu_joins_by_gloo_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = []
    monkeypatch.setattr(several_processes, "join_processes", lambda _, train: joined.append(train.device))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", several_processes.RENDEZVOUS_FILE):
        monkeypatch.setenv(name, "0")
    several_processes.join_group(0, 1, tmp_path, TrainConfig(device="auto"))
    assert joined == ["cpu"]
