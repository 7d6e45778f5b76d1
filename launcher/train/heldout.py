"""The loss of a model on held-out sequences, as training measures it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist

from biroute.data_pipeline.read.loader import Batch
from biroute.parallel.engine.engine import Engine, Microbatch


def heldout_metrics(engine: Engine, batches: Iterable[Batch], between: Callable[[], None]) -> dict[str, float]:
    """Evaluate the model on this data rank's held-out batches. Collective.

    Args:
        engine: the model.
        batches: equally many on every data rank.
        between: called before each forward pass; may raise to abort the evaluation.

    Returns:
        `heldout/loss` in nats per target token, `heldout/perplexity`, and `heldout/bits_per_byte`: bits per UTF-8
        byte of the targets, comparable between tokenizers.
    """
    remaining = iter(batches)
    total, count, counts = 0.0, 0, torch.zeros(2, dtype=torch.float64, device=engine.device)
    while some := list(islice(remaining, engine.microbatches_per_evaluation)):
        between()
        microbatches = [Microbatch.of(*batch.arrays, mesh=engine.mesh, device=engine.device) for batch in some]
        total += engine.evaluate(microbatches) * len(some)
        count += len(some)
        counts += torch.tensor([[b.target_tokens, b.target_bytes] for b in some]).sum(0).to(counts)
    loss = total / count
    dist.all_reduce(counts, group=engine.mesh.groups.dp)
    targets, target_bytes = counts.tolist()
    return {
        "heldout/loss": loss,
        "heldout/perplexity": math.exp(min(loss, 100.0)),
        "heldout/bits_per_byte": loss * targets / target_bytes / math.log(2) if target_bytes else math.nan,
    }
