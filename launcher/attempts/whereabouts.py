"""Where a rank is, by the Python frames of its threads: in a collective, waiting for its GPU, or elsewhere. No torch.

On the CPU a rank waits for the others inside of a collective. On a GPU the collective is only put into a queue; the
rank then waits where it needs a result, as in `.item()`, which has no frame of its own, or in backward for autograd's
thread. So on a GPU such a place counts as waiting, too. It is a guess: the GPU may compute, or hang by itself.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# Where torch and Triton wait for the device, or for room in its queue. Not torch.serialization, which reads files.
_TORCH_ON_GPU = re.compile(
    r"torch\.(autograd|cuda|nn|optim|functional|_tensor|_ops)(\.|$)|triton\.(runtime\.jit|backends\.\w+\.driver)$"
)
# Calls that bring a value from the device to the host, or the other way round, and wait until it is there.
_NEEDS_RESULT = {
    "float", "int", "bool", "item", "tolist", "cpu", "cuda", "numpy", "to", "copy_", "synchronize", "nonzero",
    "unique", "equal", "masked_select",
}  # fmt: skip
_STARTED_BY_PYTHON = "_bootstrap"  # outermost function of threads that Python started; C++ starts autograd's


class Whereabouts(NamedTuple):
    """Where a thread is. In a `collective`, or with `for_gpu`, it seems to wait for other ranks."""

    collective: str  # its name; "" if in none
    place: str  # `launcher/train/trainer.py:120 in _evaluate`: the innermost line of BiRoute's code
    for_gpu: bool  # whether it seems to wait for its GPU


def uses_gpu() -> bool:
    """Return whether this process has used a GPU."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # torch may be half imported
    return cuda is not None and bool(cuda.is_initialized())


def find_rank(frames: Mapping[int, FrameType], main: int, on_gpu: bool) -> Whereabouts:
    """Return where a rank is, by the innermost frame of each of its threads.

    Where the main thread is in autograd, the thread counts that autograd runs Python in, if there is one.
    """
    found = where_in(frames.get(main), on_gpu)
    if not _in_autograd(frames.get(main)):
        return found
    for thread, frame in frames.items():
        if thread != main and _outermost(frame).f_code.co_name != _STARTED_BY_PYTHON and not _in_autograd(frame):
            there = where_in(frame, on_gpu)
            return Whereabouts(there.collective, there.place or found.place, there.for_gpu)
    return found


def where_in(frame: FrameType | None, on_gpu: bool) -> Whereabouts:
    """Return where the thread is whose innermost frame is given."""
    collective = place = ""
    innermost = frame
    while frame is not None and not place:
        module = _module(frame)
        if module.startswith("torch.distributed") and frame.f_code.co_name != "wrapper":
            collective = frame.f_code.co_name  # the outermost one: broadcast_object_list rather than its broadcast
        elif module.startswith("biroute."):
            folder = "/".join(module.split(".")[1:-1])
            place = f"{folder}/{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    for_gpu = on_gpu and not collective and innermost is not None and _waits_for_gpu(innermost)
    return Whereabouts(collective, place, for_gpu)


def _waits_for_gpu(frame: FrameType) -> bool:
    return bool(_TORCH_ON_GPU.match(_module(frame))) or _called(frame) in _NEEDS_RESULT


def _in_autograd(frame: FrameType | None) -> bool:
    return frame is not None and _module(frame).startswith("torch.autograd")


def _called(frame: FrameType) -> str:
    """Return the name of what a frame calls, `tolist` in `torch.cat(sizes).tolist()`; "" if that is not known."""
    nowhere = (None, None, None, None)  # as with `python -X no_debug_ranges`
    line, end_line, start, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), nowhere)
    if line is None or end_line is None or start is None or end is None:
        return ""
    file = frame.f_code.co_filename
    source = [linecache.getline(file, number).encode() for number in range(line, end_line + 1)]
    source[-1] = source[-1][:end]
    source[0] = source[0][start:]
    try:
        call = ast.parse(b"(" + b"".join(source) + b")", mode="eval").body
    except (SyntaxError, ValueError):
        return ""
    if not isinstance(call, ast.Call):
        return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
