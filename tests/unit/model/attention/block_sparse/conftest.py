from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors are created on the GPU in `make gpu-check`."""
    torch.set_default_device(os.environ.get("BIROUTE_TEST_DEVICE", "cpu"))
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def unset_memory() -> Iterator[None]:
    """New memory holds NaN or huge numbers, so that nothing reads what nothing wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def undefined_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked load without `other` gives NaN or a huge number, where Triton's interpreter would give 0.

    On a GPU such places hold whatever the register held, so a kernel that needs the 0 must ask for it.
    """
    load = InterpreterBuilder.create_masked_load

    def poisoned(self: Any, pointers: Any, mask: Any, other: Any, *arguments: Any) -> Any:
        if other is None:
            kind = pointers.get_element_ty()
            values = load(self, pointers, mask, None, *arguments).data
            worst = np.nan if np.issubdtype(values.dtype, np.floating) else np.iinfo(values.dtype).max
            other = TensorHandle(np.full_like(values, worst), kind)
        return load(self, pointers, mask, other, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", poisoned)
