"""With exact sums, tensor ranks compute the very bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.pool import WorkerPool
from helpers.training import VOCABULARY, small_config
from torch import Tensor

from biroute.configs.layout import resolve_layout
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.mesh.mesh import build_mesh

Ranks = Callable[[int], WorkerPool]


def logits_job(parallel: dict[str, Any], exact: bool) -> Tensor:
    """This rank's part of the logits, [S, B, V / T]."""
    config = small_config(parallel=parallel, train={"exact_sums": exact}, model={"tied_embeddings": False})
    mesh = build_mesh(resolve_layout(config, dist.get_world_size()))
    layers = LayerSequence(plan_layers(config, mesh.groups))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (3, config.model.sequence_length), generator=generator)
    with torch.no_grad():
        return layers(tokens)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_compute_the_bits_of_one_process(sequence_parallel: bool, ranks: Ranks) -> None:
    parallel = {"tensor": 2, "sequence_parallel": sequence_parallel}
    (alone,) = ranks(1).run(logits_job, {}, True)
    together = torch.cat(ranks(2).run(logits_job, parallel, True), dim=-1)
    assert torch.equal(together, alone)
    in_fp32 = torch.cat(ranks(2).run(logits_job, parallel, False), dim=-1)
    assert not torch.equal(in_fp32, alone), "or this test would be about nothing"
    torch.testing.assert_close(in_fp32, alone, rtol=1e-4, atol=1e-4)
