"""`biroute bench decode`: time of one more token by the length of what stands before it.

Routed decode, our own dense decode and transformers' Llama of the same size follow one another at each length, in one
process. What stands before the token is random keys and values, written into the caches directly: how long a step
takes does not depend on what they hold, and a dense prompt of 65,536 tokens would take minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.bench.report import environment_info, say
from biroute.model.decode.attention import LayerCache
from biroute.model.decode.cached_model import CachedModel, CachedSequence
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.megatron import groups_of_one

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_PROMPT = 8192  # prompts are measured up to here
WARM_UP = 3  # steps that are not counted; the first one makes room in the caches
VOCABULARY = 8192
ATTENTION = {"region_size": 64, "topk": 8, "descriptors_per_region": 8}
# Name -> kind of attention, and whether it is exact, as `biroute generate` is on a CPU without --fast.
VARIANTS = {"routed, exact": ("bi_level", True), "routed, fast": ("bi_level", False), "dense, fast": ("dense", False)}
LLAMA = "transformers' Llama"


def run_bench(lengths: Sequence[int], steps: int) -> dict[str, Any]:
    """Measure every variant at every length, and return the measurements as plain values.

    Args:
        lengths: tokens before the one that is measured, multiples of 64.
        steps: tokens that are measured, of which the fastest is reported: other work on the machine slows some.

    Raises:
        UsageError: a length is no whole number of regions, or transformers is not installed.
    """
    size = ATTENTION["region_size"]
    wrong = [length for length in lengths if length % size]
    if wrong:
        raise UsageError(f"--length={wrong[0]} is not a multiple of the {size} tokens of a region")
    longest = max(lengths) + -(-(steps + WARM_UP + 1) // size) * size
    config = model_config(longest, "bi_level")
    rows = []
    for length in sorted(lengths):
        say(f"{length:,} tokens")
        measured = {name: _of_ours(name, longest, length, steps) for name in VARIANTS}
        rows.append({"length": length, "variants": measured | {LLAMA: _of_llama(config, length, steps)}})
    return {
        "benchmark": "decode",
        "environment_info": environment_info(),
        "settings": {"model": config.model.model_dump(mode="json"), "vocab_size": VOCABULARY, "steps": steps},
        "rows": rows,
    }


def model_config(sequence_length: int, kind: str) -> RunConfig:
    """Return the configuration of the models that are measured: the default sizes, 4 layers of 256."""
    model = {"sequence_length": sequence_length, "attention": {**ATTENTION, "kind": kind}}
    return config_from_tree({"model": model, "data": {"tokenizer": {"vocab_size": VOCABULARY}}}, "bench decode")


def filled_sequence(model: CachedModel, length: int) -> CachedSequence:
    """Return a sequence of `length` tokens whose keys and values are random."""
    caches = []
    for core in model.cores:
        cache = LayerCache(core)
        k, v = torch.randn(2, 1, core.num_kv_heads, length, model.model.head_size)
        cache.pages.append(k, v)
        cache.pages.last_key = k[:, :, -1:].clone()
        if cache.candidates is not None:
            cache.candidates.add(k)
        caches.append(cache)
    return CachedSequence(caches)


def _of_ours(name: str, longest: int, length: int, steps: int) -> dict[str, float]:
    kind, exact = VARIANTS[name]
    config = model_config(longest, kind)
    layers = LayerSequence(plan_layers(config, groups_of_one(torch.device("cpu"))))
    model = CachedModel(layers, config.model, exact=exact)
    sequence = filled_sequence(model, length)
    per_token = sequence.size_bytes() / length
    seconds = _seconds_of_steps(lambda token: model.step([sequence], [token]), steps)
    found = {"token_seconds": seconds, "bytes_per_token": per_token}
    if length <= LONGEST_PROMPT:
        found["prompt_seconds"] = _seconds_of(lambda: model.prefill([1] * length))
        found["forward_seconds"] = _seconds_of(lambda: _forward(layers, length))
    return found


@torch.no_grad()
def _forward(layers: LayerSequence, length: int) -> Tensor:
    """Training's forward pass, without the logits: a prompt needs those of its last token alone."""
    hidden_SBC: Tensor = layers.hidden_states(torch.ones(1, length, dtype=torch.int64))
    return hidden_SBC


@torch.no_grad()
def _of_llama(config: RunConfig, length: int, steps: int) -> dict[str, float]:
    """Measure transformers' Llama with its own cache: forward passes alone, and its `generate`."""
    try:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UsageError(
            "bench decode compares with transformers; install it with `pip install transformers`"
        ) from None
    model = config.model
    shape = LlamaConfig(
        vocab_size=config.padded_vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, head_dim=model.head_size,
        intermediate_size=model.ffn_hidden_size, max_position_embeddings=model.sequence_length,
        tie_word_embeddings=model.tied_embeddings,
    )  # fmt: skip
    llama = LlamaForCausalLM(shape).eval()
    cache = DynamicCache()
    for layer in range(model.num_layers):
        k, v = torch.randn(2, 1, model.num_kv_heads, length, model.head_size)
        cache.update(k, v, layer)

    def step(token: int) -> Tensor:
        logits: Tensor = llama(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        return logits[0]

    def generate() -> object:
        # What stands before is in the cache, so `generate` reads the last token alone.
        if (more := cache.get_seq_length() - length) > 0:
            cache.crop(-more)
        tokens = torch.ones(1, length + 1, dtype=torch.int64)
        return llama.generate(
            tokens, past_key_values=cache, min_new_tokens=steps, max_new_tokens=steps, do_sample=False,
            attention_mask=torch.ones_like(tokens), pad_token_id=0,
        )  # fmt: skip

    found = {
        "token_seconds": _seconds_of_steps(step, steps),
        "generate_token_seconds": _seconds_of(generate) / steps,
        "bytes_per_token": 2.0 * 4 * model.num_layers * model.num_kv_heads * model.head_size,
    }
    if length <= LONGEST_PROMPT:
        tokens = torch.ones(1, length, dtype=torch.int64)
        found["prompt_seconds"] = _seconds_of(lambda: llama(tokens, use_cache=True, logits_to_keep=1))
    return found


def _seconds_of_steps(step: Callable[[int], Tensor], steps: int) -> float:
    """Return the time of the fastest step, each with the likeliest token of the one before."""
    token, times = 1, []
    for _ in range(steps + WARM_UP):
        began = time.perf_counter()
        token = int(step(token)[0].argmax())
        times.append(time.perf_counter() - began)
    return min(times[WARM_UP:])


def _seconds_of(work: Callable[[], object]) -> float:
    """Return the time of the faster of two runs."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
