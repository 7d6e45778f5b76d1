"""A scaling study: which sizes it has, how each of them trains, and what its folder says of it. No torch.

<train.run_dir>-<mode>-scaling/
    study.json          what the study is of: a study of something else must not go on in this folder
    ranks-0002/         the run of a size: an ordinary run folder
    scaling.md, scaling.json, scaling.png
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.configs.layout import Layout, resolve_layout
from biroute.configs.load import flatten, load_config
from biroute.configs.records import parse_json, read_small
from biroute.configs.schema import RunConfig

Mode = Literal["weak", "strong"]
STUDY = "study.json"
# What does not change what is measured, or changes from size to size.
_NOT_COMPARED = ("tracking.", "slurm.", "train.run_dir", "train.accept_changes", "parallel.data")
_BY_SIZE = ("train.global_batch_size", "train.evaluate_sequences")


@dataclass(frozen=True)
class Size:
    """One size of a study: a run with so many ranks."""

    config: RunConfig
    layout: Layout

    @property
    def ranks(self) -> int:
        return self.layout.world_size

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"

    @property
    def run_dir(self) -> Path:
        return self.config.train.run_dir


@dataclass(frozen=True)
class Study:
    """All sizes, the smallest first, and what they have in common."""

    base: RunConfig  # as it was written, with the overrides
    mode: Mode
    steps: int
    sizes: Sequence[Size]

    @property
    def folder(self) -> Path:
        return study_folder(self.base, self.mode)

    @property
    def name(self) -> str:
        return f"{self.base.train.run_dir.absolute().name} {self.mode} scaling"

    def settings(self) -> dict[str, str]:
        """Return what two calls must have in common to be one study."""
        first = self.sizes[0]
        batch = first.config.train.global_batch_size
        fields = {
            name: value
            for name, value in flatten(first.config).items()
            if not name.startswith(_NOT_COMPARED) and name not in _BY_SIZE
        }
        per = {"sequences of a data rank": str(batch // first.layout.data)} if self.mode == "weak" else {}
        return fields | (per or {"train.global_batch_size": str(batch)}) | {"--mode": self.mode}


def study_folder(config: RunConfig, mode: Mode) -> Path:
    """Return the folder of a study, beside the configuration's own run folder."""
    run_dir = config.train.run_dir
    return run_dir.with_name(f"{run_dir.name}-{mode}-scaling")


def make_study(path: Path, overrides: Sequence[str], ranks: Sequence[int], mode: Mode, steps: int) -> Study:
    """Decide how each size trains. Nothing is written.

    Tensor, region and pipeline ranks stay as in the configuration, so sizes differ in their data ranks. Its batch is
    that of the smallest size: with more data ranks it grows in proportion (weak), or stays (strong).

    Args:
        path: the configuration.
        overrides: overrides of the configuration, `section.field=value`.
        ranks: numbers of ranks.
        mode: weak or strong scaling.
        steps: optimizer steps of each size.

    Raises:
        UsageError: the configuration is not usable, or its layout does not allow one of the sizes.
    """
    # A run of a few steps needs a shorter warm-up than the one that it stands for; no time depends on it.
    overrides = [*overrides, f"train.steps={steps}", "optim.warmup_steps=null"]
    base = load_config(path, overrides)
    parallel = base.parallel
    model_size = parallel.tensor * parallel.region * parallel.pipeline
    wanted = sorted(set(ranks))
    if bad := [size for size in wanted if size < 1 or size % model_size]:
        raise UsageError(
            f"--ranks {bad[0]}: not a multiple of parallel.tensor x region x pipeline = {parallel.tensor} x "
            f"{parallel.region} x {parallel.pipeline} = {model_size}; use multiples of {model_size}"
        )
    smallest, folder = wanted[0] // model_size, study_folder(base, mode)
    batch = base.train.global_batch_size
    if mode == "weak" and batch % smallest:
        raise UsageError(
            f"train.global_batch_size={batch} is the batch of the smallest size and is not a multiple of its "
            f"{smallest} data ranks; use a multiple of {smallest}"
        )
    sizes = []
    for size in wanted:
        data = size // model_size
        words = [
            f"parallel.data={data}", f"train.run_dir={json.dumps(str(folder / f'ranks-{size:04d}'))}",
            f"train.global_batch_size={batch // smallest * data if mode == 'weak' else batch}",
            f"train.evaluate_sequences={base.train.microbatch_size * data}", "train.log_every=1",
            "train.evaluate_every=0", "checkpoint.every_steps=0",
        ]  # fmt: skip
        try:
            config = load_config(path, [*overrides, *words])
            sizes.append(Size(config, resolve_layout(config, size)))
        except UsageError as error:
            raise UsageError(f"--ranks {size}: {error}") from None
    return Study(base, mode, steps, sizes)


def open_study(study: Study) -> str:
    """Create the folder of a study, or check that what it holds is of the same study; returns the key of the study.

    Raises:
        UsageError: the folder holds a study of other settings, or cannot be written.
    """
    folder, settings = study.folder, study.settings()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STUDY).exists():
            return _same_study(folder, settings)
        key = uuid.uuid4().hex
        record: dict[str, Any] = {"key": key, "settings": settings}
        write_atomically(folder / STUDY, json.dumps(record, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; set train.run_dir to a folder that can be written") from None
    return key


def _same_study(folder: Path, settings: dict[str, str]) -> str:
    try:
        record = parse_json(read_small(folder / STUDY))
        key, before = str(record["key"]), dict(record["settings"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / STUDY}: not readable; remove {folder} to begin the study anew") from None
    changed = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UsageError(
            f"{folder} holds a study of other settings ({name}: {before.get(name)} there, {settings.get(name)} "
            f"here{more}); set train.run_dir to another folder, or remove this one"
        )
    return key
