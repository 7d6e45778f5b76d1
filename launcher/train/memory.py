"""Peak memory of this process."""

from __future__ import annotations

import resource

import torch

_KIB_PER_GIB = 1 << 20


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest memory held so far in GiB: by the GPU's allocator, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (1 << 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB  # Linux counts it in KiB
