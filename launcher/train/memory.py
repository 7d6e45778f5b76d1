"""Memory of this process, as metrics."""

from __future__ import annotations

import resource

import torch

_KIB_PER_GIB = 1 << 20


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return the memory that this process has held, in GiB, under the names that MLflow shows.

    On a GPU it is the most since the last call: what tensors took, and what the allocator reserved for them, which
    fragmentation makes more. On a CPU it is the largest resident set since the process began.
    """
    if device.type != "cuda":
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        return {"memory/peak_gib": resident / _KIB_PER_GIB}
    held = {
        "memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "memory/reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return held
