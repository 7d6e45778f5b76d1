"""Count what a dense layer moves through a GPU's memory beside its products and attention: ours, and Llama's.

    python docs/count_dense_layer.py        # writes docs/benchmarks/dense_layer.md; a minute

Our layer and transformers' eager Llama layer run on the emulated device of the tests, whose operations are counted:
the bytes of what each reads and writes. Of the compiled Llama TorchInductor tells what its kernels read and write.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import compile_fx, metrics
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "dense_layer.md"
sys.path.insert(0, str(ROOT / "tests"))

from helpers import emulated_device  # noqa: E402
from helpers.emulated_device import FREE, EmulatedTensor, Emulation, to_device  # noqa: E402

from biroute.configs.load import config_from_tree  # noqa: E402
from biroute.model.attention import core  # noqa: E402
from biroute.model.block import Block  # noqa: E402
from biroute.parallel.mesh.megatron import groups_of_one  # noqa: E402

HIDDEN, HEADS, GROUPS, HEAD_SIZE, INNER, TOKENS = 512, 4, 2, 128, 1408, 4096
DTYPE = torch.bfloat16
PRODUCTS = {"mm", "bmm", "addmm"}
EAGER, COMPILED, OURS = "transformers' Llama, eager", "the same, `torch.compile`", "BiRoute"
# The model that was measured on an NVIDIA H200 on 2026-11-26: hidden size, layers, tokens, and tokens a second.
HIDDEN_MEASURED, LAYERS_MEASURED, TOKENS_MEASURED, SPEED_MEASURED = 2048, 12, 8192, 74_200
STREAM = 3.1e12  # bytes a second, of the page on paper


@dataclass
class Passes:
    """Bytes that were read and written, and kernels."""

    moved: int = 0
    kernels: int = 0

    def add(self, tensors: list[Tensor]) -> None:
        self.kernels += 1
        self.moved += sum(_nbytes(x) for x in {id(x): x for x in tensors}.values())

    def __sub__(self, other: Passes) -> Passes:
        return Passes(self.moved - other.moved, self.kernels - other.kernels)


COUNT = Passes()
_counting = True


@contextmanager
def not_counted() -> Iterator[None]:
    """Inside, operations do not count."""
    global _counting
    _counting = False
    yield
    _counting = True


def _nbytes(x: Tensor) -> int:
    """Bytes of what is there once: an expanded dimension is read from a cache."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def count_operations() -> None:
    """Count from now on what runs on the emulated device."""
    from triton.runtime.interpreter import GridExecutor

    emulated_device.activate()
    run, launch = emulated_device.run, GridExecutor.__call__

    def counted(operation: Any, args: Any, kwargs: Any) -> Any:
        result = run(operation, args, kwargs)
        name = operation._schema.name.split("::")[-1]
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, EmulatedTensor)]
        if _counting and tensors and name not in FREE | PRODUCTS:
            COUNT.add(tensors)
        return result

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        COUNT.add([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        return launch(self, *args, **kwargs)

    emulated_device.run = counted
    GridExecutor.__call__ = counted_launch


class _NotCounted(torch.autograd.Function):
    """A function whose operations do not count, nor those of its backward."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with not_counted(), torch.enable_grad():
            out: Tensor = function(*leaves)
        ctx.kept = leaves, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        leaves, out = ctx.kept
        with not_counted():
            return None, *torch.autograd.grad(out, leaves, dout)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention, not counted. Outputs and gradients lie in memory token by token, as on CUDA."""

    def causal(*inputs: Tensor) -> Tensor:
        by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        out = F.scaled_dot_product_attention(*by_token, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    attended: Tensor = _NotCounted.apply(causal, q, k, v)
    return attended


def place(module: nn.Module) -> None:
    """Move a module's parameters to the device, in 16 bits."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(to_device(parameter.detach().to(DTYPE)))


def measure(module: nn.Module, layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Passes, Passes]:
    """Count forward and backward of a module's layer that is given, and gives, hidden states of a shape."""
    hidden = to_device(torch.randn(shape).to(DTYPE)).requires_grad_()
    upstream = to_device(torch.randn(shape).to(DTYPE))
    layer(hidden).backward(upstream)  # what is made once, such as tables of angles
    module.zero_grad(set_to_none=True)
    hidden.grad = None
    begin = Passes(COUNT.moved, COUNT.kernels)
    out = layer(hidden)
    middle = Passes(COUNT.moved, COUNT.kernels)
    torch.autograd.backward(out, upstream)
    return middle - begin, COUNT - middle


def ours() -> tuple[Passes, Passes]:
    """Count a dense layer of ours."""
    model = {
        "hidden_size": HIDDEN, "num_layers": 1, "num_heads": HEADS, "num_kv_heads": GROUPS, "head_size": HEAD_SIZE,
        "ffn_hidden_size": INNER, "sequence_length": TOKENS, "key_smear": False, "attention": {"kind": "dense"},
    }  # fmt: skip
    block = Block(config_from_tree({"model": model}, "count").model, 0, groups_of_one(torch.device("cpu")))
    place(block)
    with patch.object(core, "dense_attention", lambda q, k, v, **_: attention(q, k, v)):
        return measure(block, block, (TOKENS, 1, HIDDEN))


def llama(layers: int) -> Any:
    """Build a Llama of the same sizes, and its settings."""
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    AttentionInterface.register(
        "counted", lambda module, q, k, v, *_, **__: (attention(q, k, v).transpose(1, 2), None)
    )
    shape = LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD_SIZE, max_position_embeddings=TOKENS,
        attn_implementation="counted",
    )  # fmt: skip
    return LlamaModel(shape)


def eager() -> tuple[Passes, Passes]:
    """Count an eager Llama layer."""
    model = llama(1)
    angles = model.rotary_emb(torch.zeros(1, TOKENS, HIDDEN, dtype=DTYPE), torch.arange(TOKENS)[None])
    tables = tuple(to_device(x) for x in angles)
    layer = model.layers[0]
    place(layer)

    def forward(hidden: Tensor) -> Tensor:
        out: Tensor = layer(hidden, position_embeddings=tables)
        return out

    return measure(layer, forward, (1, TOKENS, HIDDEN))


def compiled() -> tuple[Passes, Passes]:
    """Let TorchInductor tell what a compiled Llama layer moves: of four layers what is more than of two, halved."""
    two, four = (_compiled(layers) for layers in (2, 4))
    halves = [Passes((b.moved - a.moved) // 2, (b.kernels - a.kernels) // 2) for a, b in zip(two, four, strict=True)]
    return halves[0], halves[1]


def _compiled(layers: int) -> tuple[Passes, Passes]:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = llama(layers).to(DTYPE)
    AttentionInterface.register("counted", sdpa_attention_forward)
    torch.compiler.reset()
    metrics.reset()
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # only then it counts
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=DTYPE, requires_grad=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(model, dynamic=False)(inputs_embeds=hidden, use_cache=False).last_hidden_state
        forward = _told()
        out.backward(torch.randn_like(out))
        return forward, _told() - forward


def _told() -> Passes:
    own = [4 * words for node, words in metrics.nodes_num_elem if not node.is_extern()]
    return Passes(sum(own), len(own))


def page(found: dict[str, tuple[Passes, Passes]]) -> str:
    """Write the page."""
    rows = []
    for name, (forward, backward) in found.items():
        forth, back = (x.moved / TOKENS / HIDDEN for x in (forward, backward))
        moved = (forth + back) * HIDDEN_MEASURED * LAYERS_MEASURED * TOKENS_MEASURED
        kernels = f"{forward.kernels} / {backward.kernels}"
        rows.append(
            f"| {name} | {forth:.0f} | {back:.0f} | {forth + back:.0f} | {kernels} | {1e3 * moved / STREAM:.1f} |"
        )
    step = 1e3 * TOKENS_MEASURED / SPEED_MEASURED
    return f"""{INTRODUCTION}
| layer | forward | backward | both | kernels | ms of a step |
| --- | --: | --: | --: | --: | --: |
{chr(10).join(rows)}

{EXPLANATION.format(step=step)}"""


INTRODUCTION = f"""# A dense layer beside Llama's, on paper

`python docs/count_dense_layer.py` writes this page. Nothing here ran on a GPU: it is what one layer reads and writes
beside its matrix products and attention, in bytes for each token and element of its hidden state, in bf16.
Hidden size {HIDDEN}, {HEADS} query and {GROUPS} key/value heads, an MLP {INNER / HIDDEN:g} times as wide.
Ours and the eager one are counted operation by operation on the emulated device of the tests. What the compiled one
moves is told by TorchInductor, which compiled it for a CPU: what it fuses there, it fuses on a GPU.
"""

EXPLANATION = f"""*ms of a step*: so many bytes at {STREAM / 1e12:g} TB/s, {LAYERS_MEASURED} layers of
hidden size {HIDDEN_MEASURED:,}, {TOKENS_MEASURED:,} tokens. On one NVIDIA H200 such a model took {{step:.0f}} ms
on 2026-11-26, ours of that day as long as an eager loop; products and attention took the rest. The loss comes on
top: ours reads logits twice and writes their gradient once, in their place (`model/cross_entropy_kernels.py`).
`biroute bench gpu` measures whole steps beside both.
"""


def main() -> None:
    count_operations()  # before the first backward pass, whose threads are one for each device
    found = {COMPILED: compiled()}
    with Emulation():
        found |= {EAGER: eager(), OURS: ours()}
    PAGE.write_text(page({name: found[name] for name in (EAGER, COMPILED, OURS)}), encoding="utf-8")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
