"""`biroute bench gpu`: a routed layer and whole training steps on a GPU beside dense attention, and their targets.

Each row is kept in a file as soon as it is measured, so that a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.configs.schema import AttentionConfig, ModelConfig
from biroute.launcher.bench.gpu.layer import Layer, compared, measure_layer
from biroute.launcher.bench.gpu.llama import NAMES, llama_steps
from biroute.launcher.bench.gpu.parts import measure_parts
from biroute.launcher.bench.gpu.routes import trained_routes
from biroute.launcher.bench.gpu.steps import free_memory, measure_steps, step_config
from biroute.launcher.bench.gpu.targets import STEP_MODEL, STEP_VOCABULARY, TARGETS
from biroute.launcher.bench.report import environment_info, say
from biroute.launcher.bench.rows import KeptRows, Row
from biroute.launcher.bench.single_process import join_alone

LAYER = Layer()
LENGTHS = (8_192, 32_768, 131_072)
BLOCKS = (1, LAYER.region_size)  # a route per token, and per region
RANKS = 4  # whose parts of a route are measured


def the_gpu() -> torch.device:
    """Return the GPU to measure on.

    Raises:
        UsageError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UsageError("biroute bench gpu: torch sees no GPU here; biroute bench attention measures a CPU")
    return torch.device("cuda", torch.cuda.current_device())


def check_lengths(lengths: Sequence[int]) -> None:
    """Check that every length is whole regions on each of the ranks whose parts are measured.

    Raises:
        UsageError: one is not.
    """
    step = RANKS * LAYER.region_size
    for tokens in lengths:
        if tokens % step:
            near = step * max(1, round(tokens / step))
            raise UsageError(f"--length {tokens} is no multiple of {step} tokens; use {near}")


def join(device: torch.device) -> None:
    """Make this process a group of one on the device, before a trained model would make one on the CPU."""
    join_alone(step_config(STEP_MODEL, AttentionConfig(), device), device)


def routes_of_run(run: Path | None, text: Path | None, tokens: int) -> dict[int, Tensor] | None:
    """Return the routes that a trained run chooses for a text, by tokens of a query block; None without a run.

    Raises:
        UsageError: one of run and text is given alone, or `trained_routes` refuses them.
    """
    if run is None and text is None:
        return None
    if run is None or text is None:
        raise UsageError("--run and --text belong together: a trained run, and a text that its model reads")
    sizes = {"region_size": LAYER.region_size, "topk": LAYER.topk, "heads": LAYER.num_kv_heads}
    return trained_routes(run, text, tokens, BLOCKS, **sizes)


def run_bench(
    device: torch.device,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 5,
    *,
    routes: Mapping[int, Tensor] | None = None,
    layer: Layer = LAYER,
    step_model: ModelConfig | None = STEP_MODEL,
    rows: Path | None = None,
) -> dict[str, Any]:
    """Measure layers, parts of layers and training steps, the longest sequences last, and return plain values.

    Args:
        device: where.
        lengths: tokens of a sequence.
        repeats: runs of each setting.
        routes: of a trained model, by tokens of a query block, for the longest sequence (`routes.trained_routes`);
            left out: white noise's alone.
        layer: sizes of a layer.
        step_model: a model of which whole training steps are measured; None not to.
        rows: file that keeps finished rows.
    """
    about_run = environment_info() | {"device": device_name(device)}
    software = about_run["software"] = f"{about_run['software']}, transformers {_version('transformers')}"
    chosen = [hashlib.sha256(route.numpy().tobytes()).hexdigest() for route in (routes or {}).values()]
    about = [about_run["code"], software, about_run["device"], repeats, repr(layer), repr(step_model), chosen]
    kept = KeptRows(rows, about)
    layers, parts, steps = list[Row](), list[Row](), list[Row]()
    for tokens in sorted(lengths):
        given = {block: route[:, :, : tokens // block] for block, route in (routes or {}).items()}
        for block in (1, layer.region_size):
            of_kind = {"trained": given[block]} if given else {}
            for kind, route in {**of_kind, "random": None}.items():
                work: Callable[[], Row] = partial(measure_layer, layer, tokens, block, device, repeats, route)
                layers.append(_row(kept, f"a layer, {kind} routes, {tokens:,} tokens, Lq {block}", work))
            work = partial(measure_parts, layer, tokens, block, device, repeats, RANKS)
            parts.append(_row(kept, f"{RANKS} ranks' parts, {tokens:,} tokens, Lq {block}", work))
        if step_model is not None:
            sized = step_model.model_copy(update={"sequence_length": tokens})
            work = partial(_steps, sized, layer, device, repeats, given)
            steps.append(_row(kept, f"training steps, {tokens:,} tokens", work))
            for compiled in (False, True):
                work = partial(_llama, sized, device, repeats, compiled)
                steps.append(_row(kept, f"{NAMES[compiled]}, {tokens:,} tokens", work))
    failed = [f"{row['name']}: {row['error']}" for row in (*layers, *parts, *steps) if "error" in row]
    layers, parts, steps = ([row for row in some if "error" not in row] for some in (layers, parts, steps))
    return {
        "benchmark": "gpu",
        "environment_info": about_run,
        "settings": {"repeats": repeats, **{name: str(value) for name, value in asdict(layer).items()}},
        "layers": [row | {"compared": asdict(compared(row))} for row in layers],
        "targets": _targets(layers),
        "parts": parts,
        "train_steps": _compared_with_dense([row for one in steps for row in one["rows"]]),
        "failed": failed,
    }


def _row(kept: KeptRows, name: str, work: Callable[[], Row]) -> Row:
    """The row of that name; one that fails, for want of memory or in a compiler, is told and costs no other."""
    try:
        row = kept.row(name, lambda: {"name": name, **work()})
    except UsageError:
        raise
    except Exception as failure:
        row = {"name": name, "error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
    free_memory()  # here, where no traceback of a failure holds tensors any more
    say(f"{name}: {row.get('error', 'measured')}")
    return row


def _targets(layers: Sequence[Row]) -> list[dict[str, Any]]:
    """What is asked of the layers that were measured, with trained routes where there are some."""
    found = []
    for target in TARGETS:
        of_kind = {
            row["routes"]: compared(row)
            for row in layers
            if (row["tokens"], row["block"]) == (target.tokens, target.block)
        }
        first = of_kind.get("trained", of_kind.get("random"))
        if first is not None:
            values = {kind: target.found(one) for kind, one in of_kind.items()}
            found.append({"name": target.text, "tokens": target.tokens, "block": target.block, "asked": target.bound,
                          "met": target.met(first), **values})  # fmt: skip
    return found


def _steps(model: ModelConfig, layer: Layer, device: torch.device, repeats: int, routes: Mapping[int, Tensor]) -> Row:
    return {"rows": measure_steps(_clock(device), repeats, model, layer, device, routes)}


def _llama(model: ModelConfig, device: torch.device, repeats: int, compiled: bool) -> Row:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row = llama_steps(model, STEP_VOCABULARY, device, dtype, _clock(device), repeats, compiled=compiled)
    return {"rows": [row]}


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all that the device was asked for."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _compared_with_dense(rows: Sequence[Row]) -> list[Row]:
    """Each row with how many times as fast as our dense model's step of that length it is; none without that step."""
    dense = {row["num_tokens"]: row["seconds"] for row in rows if row["name"] == "dense"}
    return [row | {"ratio": dense[row["num_tokens"]] / row["seconds"]} for row in rows if row["num_tokens"] in dense]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def device_name(device: torch.device) -> str:
    """Return what the device is called, with the CUDA that torch was built for and Triton where it is a GPU."""
    if device.type != "cuda":
        return str(device)
    import triton

    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
