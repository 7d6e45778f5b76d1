"""Part of `biroute bench gpu`: training steps of transformers' Llama of the same sizes, eager and compiled.

A bare loop: forward with PyTorch's attention, cross-entropy, backward, clipping, a fused AdamW on the weights as they
are, without the fp32 copies that our engine keeps in bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from biroute.configs.errors import UsageError
from biroute.configs.schema import ModelConfig

_ATTENTION = "causal_sdpa"
NAMES = {False: "transformers' Llama", True: "transformers' Llama, torch.compile"}


def check_installed() -> None:
    """Check that transformers 5 is installed.

    Raises:
        UsageError: it is not.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith("5."):
        raise UsageError(
            f"bench gpu compares training steps with transformers 5, and finds {found}; install it with "
            "`pip install 'transformers>=5,<6'`, or use --no-train-step"
        )


def llama_steps(
    model: ModelConfig,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    now: Callable[[], float],
    repeats: int,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """Measure training steps over one sequence.

    Args:
        model: the sizes.
        vocabulary: words.
        device: where it trains.
        dtype: of weights and activations.
        now: a clock in seconds.
        repeats: steps, after two that warm up and compile.
        compiled: whether `torch.compile` compiles the model.

    Returns:
        A row as those of `measure_train_steps`, without a ratio.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Attention of that name gets no mask: while it is compiled, transformers would else make one of S x S, and
    # PyTorch could not take its fast causal kernels.
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    shape = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=vocabulary, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, head_dim=model.head_size,
        max_position_embeddings=model.sequence_length, tie_word_embeddings=model.tied_embeddings,
        attn_implementation=_ATTENTION,
    )  # fmt: skip
    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM(shape)
    llama.to(device=device, dtype=dtype)
    torch.compiler.reset()  # or sequences of another length would be compiled for any length
    forward: Callable[..., Any] = torch.compile(llama, dynamic=False) if compiled else llama
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, (1, model.sequence_length + 1), device=device)

    def step() -> float:
        started = now()
        logits = forward(tokens[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), tokens[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - started

    seconds = statistics.median([step() for _ in range(repeats + 2)][2:])
    return {"name": NAMES[compiled], "kind": "dense", "routes": None, "num_tokens": model.sequence_length,
            "num_layers": model.num_layers, "hidden_size": model.hidden_size, "seconds": seconds,
            "tokens_per_second": model.sequence_length / seconds, "target": None}  # fmt: skip
