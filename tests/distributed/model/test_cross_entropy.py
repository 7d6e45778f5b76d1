"""The loss as a GPU computes it: values, gradients, memory, and no wait of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import emulated_device
from helpers.emulated_device import COUNTS, EmulatedTensor, Emulation, to_device
from helpers.pool import WorkerPool
from helpers.training import small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from biroute.configs.layout import resolve_layout
from biroute.model.cross_entropy import chunked_cross_entropy
from biroute.model.language_model import loss_function
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]
VOCABULARY, TOKENS, BATCH = 40, 16, 3


class LargestInFp32(TorchDispatchMode):
    """Remembers the most elements that an fp32 tensor had."""

    most = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float32]
        self.most = max([self.most, *sizes])
        return result


def loss_job(tensor: int, dtype: torch.dtype) -> tuple[float, float, int, int]:
    """How far loss and gradient are from torch's, the largest fp32 tensor in elements, and its bound."""
    mesh = build_mesh(resolve_layout(small_config(parallel={"tensor": tensor}), tensor))
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, BATCH, VOCABULARY, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS, BATCH), generator=generator)
    weights = torch.rand(TOKENS, BATCH, generator=generator)
    losses = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * weights.flatten()).sum()
    (gradient,) = torch.autograd.grad(3.0 * expected, logits)
    width = VOCABULARY // tensor
    mine = slice(mesh.at.tensor * width, (mesh.at.tensor + 1) * width)
    own = logits.detach()[..., mine].contiguous().requires_grad_()
    with LargestInFp32() as largest:
        found = chunked_cross_entropy(own.clone(), labels, weights, chunk_elements=5 * width)
        (found_gradient,) = torch.autograd.grad(3.0 * found, own)
    difference = (found_gradient.double() - gradient[..., mine].double()).abs().max()
    return float((found - expected).abs()), float(difference), largest.most, 5 * width


@pytest.mark.parametrize(("tensor", "dtype", "tolerance"), [(1, torch.float32, 1e-6), (2, torch.bfloat16, 2e-2)])
def test_the_loss_in_chunks_is_cross_entropy(ranks: Ranks, tensor: int, dtype: torch.dtype, tolerance: float) -> None:
    for loss, gradient, largest, bound in ranks(tensor).run(loss_job, tensor, dtype):
        assert loss < 1e-4
        assert gradient < tolerance
        if dtype != torch.float32:
            assert largest == max(bound, TOKENS * BATCH)


def device_job(objective: str) -> tuple[float, float, int, int]:
    """The loss on the emulated device beside that on the CPU; launches, and waits and copies."""
    config = small_config(model={"objective": objective})
    build_mesh(resolve_layout(config, 1))
    emulated_device.activate()
    shape = (2, config.model.sequence_length)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.3 if objective == "mlm" else None
    logits = torch.randn(shape[1], 2, VOCABULARY, generator=generator, requires_grad=True)
    loss_of = loss_function(config.model)
    expected = loss_of(logits.clone(), labels, mask)
    (gradient,) = torch.autograd.grad(expected, logits)
    with Emulation():
        there = to_device(logits)
        targets = [to_device(labels), None if mask is None else to_device(mask)]
        COUNTS.clear()
        found = loss_of(there.clone(), *targets)
        (found_gradient,) = torch.autograd.grad(found, there)
        launches, others = (sum(x.values()) for x in (COUNTS.launches, COUNTS.waits + COUNTS.copies))
    assert isinstance(found, EmulatedTensor)
    difference = (found_gradient.inner - gradient).abs().max()
    return float((found.inner - expected).abs()), float(difference), launches, others


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_on_a_device_it_is_the_same_and_the_host_waits_nowhere(ranks: Ranks, objective: str) -> None:
    ((loss, gradient, launches, others),) = ranks(1).run(device_job, objective)
    assert loss < 1e-6
    assert gradient < 1e-8
    assert launches <= 36
    assert others == 0
