"""The loss as a GPU computes it: values, gradients, memory, and no wait of the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import emulated_device
from helpers.emulated_device import COUNTS, EmulatedTensor, Emulation, to_device
from helpers.pool import WorkerPool
from helpers.training import small_config

from biroute.configs.layout import resolve_layout
from biroute.model.cross_entropy import cross_entropy_in_place
from biroute.model.cross_entropy_kernels import WIDTH
from biroute.model.language_model import loss_function
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]
VOCABULARY, TOKENS, BATCH = 40, 16, 3


def loss_job(tensor: int, dtype: torch.dtype, width: int) -> tuple[float, float, bool]:
    """How far loss and gradient are from torch's, and whether the gradient is where the logits were."""
    mesh = build_mesh(resolve_layout(small_config(parallel={"tensor": tensor}), tensor))
    generator = torch.Generator().manual_seed(0)
    vocabulary = width * tensor
    logits = (torch.randn(TOKENS, BATCH, vocabulary, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (TOKENS, BATCH), generator=generator)
    weights = torch.rand(BATCH, TOKENS, generator=generator).t()
    losses = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * weights.flatten()).sum()
    (gradient,) = torch.autograd.grad(3.0 * expected, logits)
    mine = slice(mesh.at.tensor * width, (mesh.at.tensor + 1) * width)
    own = logits.detach()[..., mine].contiguous().requires_grad_()
    copied = own.clone()
    found = cross_entropy_in_place(copied, labels, weights)
    assert copied.equal(own), "forward changes nothing"
    (found_gradient,) = torch.autograd.grad(3.0 * found, own)
    difference = (found_gradient.double() - gradient[..., mine].double()).abs().max()
    in_place = copied.data_ptr() == found_gradient.data_ptr()
    return float((found - expected).abs()), float(difference), in_place


@pytest.mark.parametrize(
    ("tensor", "dtype", "width", "tolerance"),
    [(1, torch.float32, 40, 1e-6), (2, torch.float16, 40, 2e-3), (2, torch.float32, WIDTH + 3, 1e-6)],
)
def test_the_loss_is_cross_entropy(
    ranks: Ranks, tensor: int, dtype: torch.dtype, width: int, tolerance: float
) -> None:
    """Over one or two tensor ranks, where a row fills no block of the kernels, and where it fills more than one."""
    for loss, gradient, in_place in ranks(tensor).run(loss_job, tensor, dtype, width):
        assert loss < 2e-4
        assert gradient < tolerance
        assert in_place


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
    assert launches <= 24
    assert others == 0
