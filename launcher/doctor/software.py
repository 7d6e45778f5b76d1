"""Checks of what surrounds torch: versions, compiler, fabric, memory, the shared folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from biroute.launcher.doctor.check import Check
from biroute.launcher.ranks.gpu_check import c_compiler

_SHOWN = ("torch", "deepspeed", "megatron-core", "triton", "numpy", "sentencepiece", "webdataset", "mlflow")
_TRIAL_MIB = 16
_LEAST_FREE_GIB = 10


def software_checks(run_dir: Path) -> Iterator[Check]:
    """Check this machine's software, memory and the folder of runs."""
    yield Check("host", platform.node())
    yield Check("python", platform.python_version())
    yield from version_checks()
    yield Check("cores", str(len(os.sched_getaffinity(0))))
    yield Check("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB")
    yield compiler_check()
    yield Check("fabric", fabric())
    yield folder_check(run_dir)


def version_checks() -> Iterator[Check]:
    """Compare the versions of packages with those that BiRoute accepts."""
    required = [Requirement(text) for text in metadata.requires("biroute") or ()]
    accepted = {
        need.name: need.specifier for need in required if need.marker is None or "extra" not in str(need.marker)
    }
    for name in _SHOWN:
        wanted = accepted.get(name)
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing = f"it is not installed; pip install '{name}{wanted}'" if wanted is not None else ""
            yield Check(name, "none", missing)
            continue
        fits = wanted is None or wanted.contains(found, prereleases=True)
        yield Check(name, found, "" if fits else f"BiRoute needs {wanted}; pip install '{name}{wanted}'")


def compiler_check() -> Check:
    """Look for the C compiler that Triton calls where there is a GPU."""
    found = c_compiler()
    gpus = any(Path("/proc/driver/nvidia/gpus").glob("*"))
    missing = "Triton needs one on a GPU; install gcc, or load the cluster's module" if gpus and not found else ""
    return Check("C compiler", found or "none", missing)


def driver() -> str:
    """Return the version of NVIDIA's driver, or "none"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "none"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def fabric() -> str:
    """Return the InfiniBand devices, or else the network interfaces that are up."""
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if devices:
        return "InfiniBand " + " ".join(devices)
    up = sorted(name for name, state in psutil.net_if_stats().items() if state.isup)
    return "no InfiniBand; interfaces " + " ".join(up)


def folder_check(run_dir: Path) -> Check:
    """Write a file to the nearest existing parent of the folder of runs, flush it to the disk and read it back."""
    folder = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    data = os.urandom(_TRIAL_MIB << 20)
    name = f"run folder {run_dir}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".biroute-doctor-") as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            same = Path(file.name).read_bytes() == data
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Check(name, "not usable", f"{folder}: {error.strerror}; choose another train.run_dir")
    value = f"{folder}: {_TRIAL_MIB / seconds:.0f} MiB/s written and flushed, {free:.0f} GiB free"
    if not same:
        return Check(name, value, "what was read is not what was written; use another file system")
    few = f"less than {_LEAST_FREE_GIB} GiB are free; checkpoints need more" if free < _LEAST_FREE_GIB else ""
    return Check(name, value, few)
