"""Whether torch can use the GPUs of this node, and why not."""

from __future__ import annotations

import shutil

import torch


def gpu_problems(ranks: int) -> list[str]:
    """Check that torch has a working GPU for each of `ranks` ranks on this node.

    A small matrix product runs on every GPU, because a GPU that is listed may still be unusable.

    Returns:
        One sentence for each problem.
    """
    count = torch.cuda.device_count()
    if count < ranks:
        without_cuda = "it is built without CUDA; install a CUDA build"
        reason = without_cuda if torch.version.cuda is None else "see nvidia-smi, the driver, and --nv of a container"
        return [f"torch {torch.__version__} sees {count} GPUs for {ranks} ranks: {reason}"]
    problems = [problem for index in range(count) if (problem := _product_problem(index))]
    if c_compiler() is None:
        problems.append("no C compiler (cc, gcc or clang) in PATH; Triton needs one to load its kernels")
    return problems


def c_compiler() -> str | None:
    """Return the path of a C compiler, which Triton calls to load its kernels; None if there is none."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def _product_problem(index: int) -> str:
    try:
        x = torch.eye(64, device=f"cuda:{index}")
        total = float((x @ x).sum())
    except RuntimeError as error:
        return f"GPU {index}: {str(error).splitlines()[0]}"
    return "" if total == 64.0 else f"GPU {index}: a matrix product gives {total}, not 64"
