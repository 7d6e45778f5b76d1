"""A device other than the CPU, emulated on the CPU, so that machines without a GPU can test what a GPU would see.

A tensor on the device wraps a CPU tensor. Each operation computes real values on the wrapped tensors, fails where
tensors of both devices meet, and is counted, with the line of ours that called it:

- launches: operations that would start at least one kernel;
- waits: operations whose result, or the size of it, the host must know: it would wait for the device;
- copies: between the device and the host.

Triton's kernels run in its interpreter, a launch each. Memory and time are not emulated. `activate` renames torch's
device type for extensions, once and for the whole process, so it belongs into the jobs of a `WorkerPool`.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

TYPE = "emulated"
OUR_CODE = Path(__file__).resolve().parents[2]
# They give a number to the host, or a tensor whose size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
           "bincount", "is_nonzero"}  # fmt: skip
# Views and allocations start no kernel.
FREE = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "slice", "select",
        "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "unfold",
        "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "is_pinned"}  # fmt: skip


@dataclass
class Counts:
    """What was counted, by "operation file:line"."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.launches, self.waits, self.copies):
            counter.clear()


COUNTS = Counts()


def activate() -> torch.device:
    """Create the device in this process, and let it run the Triton kernels."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    from triton.runtime.interpreter import GridExecutor

    from biroute.model.attention.grid import KERNEL_DEVICES

    _setup_privateuseone_for_python_backend(TYPE)
    KERNEL_DEVICES.add(TYPE)
    execute = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        COUNTS.launches[f"{self.fn.__name__} {caller()}"] += 1
        args, kwargs = tree_map_only(EmulatedTensor, lambda x: x.inner, (args, kwargs))
        with _disable_current_modes():
            return execute(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    torch.tensor = tensor
    return torch.device(TYPE, 0)


from_data = torch.tensor


def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """As `torch.tensor`, whose own copy to a device no dispatcher sees."""
    if device is None or torch.device(device).type != TYPE:
        return from_data(data, device=device, **kwargs)
    COUNTS.copies[f"tensor {caller()}"] += 1
    return EmulatedTensor(from_data(data, **kwargs))


class EmulatedTensor(torch.Tensor):
    """A tensor on the emulated device, around a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> EmulatedTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(TYPE, 0), **layout)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        COUNTS.waits[f"tolist {caller()}"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Inside, tensors may be created on the device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def to_device(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device, that requires a gradient if `x` does."""
    return EmulatedTensor(x.detach().clone()).requires_grad_(x.requires_grad)


def caller() -> str:
    """File and line of the innermost frame of the product."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()  # a package may lie behind a link
        if path.is_relative_to(OUR_CODE) and not path.relative_to(OUR_CODE).parts[0].startswith((".venv", "tests")):
            return f"{path.relative_to(OUR_CODE)}:{frame.lineno}"
    return "?"


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on the wrapped tensors."""
    name = operation._schema.name.split("::")[-1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, EmulatedTensor)]
    on_host = [x for x in tensors if not isinstance(x, EmulatedTensor)]
    wanted = kwargs.get("device")
    stays = torch.device(wanted).type == TYPE if wanted is not None else bool(on_device)
    copies = name in ("copy_", "_to_copy") and (bool(on_device) != stays or bool(on_device and on_host))
    if on_device and on_host and not copies:
        refuse_mixing(operation, name, on_host)
    count(name, args, kwargs, copies, on_device or stays)
    keywords = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if wanted is not None:
        keywords["device"] = torch.device("cpu")
    inner_args, inner_kwargs = tree_map_only(EmulatedTensor, lambda x: x.inner, (args, keywords))
    result = operation(*inner_args, **inner_kwargs)
    if not stays:
        return result
    known = {id(x.inner): x for x in on_device}  # an operation in place returns what it was given
    return tree_map_only(torch.Tensor, lambda x: known.get(id(x)) if id(x) in known else EmulatedTensor(x), result)


def refuse_mixing(operation: Any, name: str, on_host: list[torch.Tensor]) -> None:
    """As torch does: a host tensor of no dimension may join; an index is copied to the device."""
    for x in on_host:
        if x.dim() and not name.startswith("index"):
            raise RuntimeError(f"{operation} at {caller()}: tensors on {TYPE} and on the CPU, {tuple(x.shape)}")
        if x.dim():
            COUNTS.copies[f"{name} {caller()}"] += 1


def count(name: str, args: Any, kwargs: dict[str, Any], copies: bool, counted: Any) -> None:
    if copies:
        COUNTS.copies[f"{name} {caller()}"] += 1
    elif counted:
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in tree_leaves(args[1] if len(args) > 1 else None)
        )
        if name in WAITING or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            COUNTS.waits[f"{name} {caller()}"] += 1
        if name not in FREE:
            COUNTS.launches[f"{name} {caller()}"] += 1
