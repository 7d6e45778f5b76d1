"""`biroute train`: check everything that can be checked without torch, then start the ranks or join them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from biroute.configs.errors import UserError
from biroute.configs.layout import default_world_size, resolve_layout
from biroute.configs.load import load_config
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.loader import open_dataset
from biroute.launcher.identity import model_identity
from biroute.launcher.local import run_local_ranks
from biroute.launcher.tracking_uri import tracking_uri
from biroute.launcher.worker import train_rank
from biroute.parallel.checkpoint_files import check_newest


def train_here(config_path: Path, overrides: Sequence[str], processes: int | None) -> int:
    """Train with the ranks of this machine, or as one rank if another launcher started us; the exit status.

    Raises:
        UserError: the configuration, the layout or the dataset is not usable.
    """
    config = load_config(config_path, overrides)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return train_rank(str(config_path), list(overrides))
    world_size = processes or _processes_wanted(config)
    layout = resolve_layout(config, world_size)
    dataset = open_dataset(config)
    dataset.heldout_batches(data_rank=0, data_size=layout.data)  # enough held-out text?
    make_run_dir(config.train.run_dir)
    check_newest(config.train.run_dir / "checkpoints", model_identity(config, dataset))
    if config.tracking.enabled:
        tracking_uri(config, config.train.run_dir)  # a URI that can't work is an error now, not in a minute
    return run_local_ranks([str(config_path), *overrides], world_size, config.train.run_dir / "logs")


def make_run_dir(path: Path) -> None:
    """Create the run folder. Raises UserError if it can't be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"train.run_dir={path}: {error.strerror}; use a folder that can be written") from None


def _processes_wanted(config: RunConfig) -> int:
    """Ranks to start when nobody says how many: one per GPU if data parallelism may take them, else the layout's."""
    needed = default_world_size(config)
    gpus = 0 if config.train.device == "cpu" else _visible_gpus()
    if config.parallel.data is None and gpus > needed:
        return gpus - gpus % needed
    return needed


def _visible_gpus() -> int:
    """GPUs of this machine, found without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([device for device in named.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
