"""What differs between the configuration of a checkpoint and the one that resumes from it, and what may. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from biroute.configs.errors import UsageError
from biroute.configs.load import flatten
from biroute.configs.schema import DATASET, RunConfig
from biroute.configs.section import fields_on_resume

MIX_VERSION = 2  # the order that weights give (data_pipeline/read/mix.py); part of what identifies a run


def settings_to_compare(config: RunConfig, dataset_checksum: str) -> dict[str, str]:
    """Return name -> value of all that is not free; a checkpoint keeps it."""
    flat = flatten(config)
    kept = {name: flat[name] for name, kind in fields_on_resume(RunConfig) if kind != "free" and name in flat}
    weights = [f"{source.name} {source.weight}" for source in config.data.sources if source.weight is not None]
    mix = f"{', '.join(weights)} (mix {MIX_VERSION})" if weights else "none"
    return kept | {DATASET: dataset_checksum, "data.sources.weight": mix}


def compare_settings(saved: Mapping[str, str], ours: Mapping[str, str], accepted: Sequence[str]) -> list[str]:
    """Return one line for each setting that differs from a checkpoint's and is taken all the same.

    Raises:
        UsageError: a setting that makes it another run differs, and `accepted` does not name it.
    """
    kinds = dict(fields_on_resume(RunConfig)) | {DATASET: "identity"}
    differing = [name for name in ours if name in saved and saved[name] != ours[name]]
    refused = [name for name in differing if kinds[name] == "identity" and name not in accepted]
    if refused:
        changes = ", ".join(f"{name}: {saved[name]} there, {ours[name]} here" for name in refused)
        raise UsageError(
            f"this would not be the run that the checkpoint belongs to ({changes}); set them back, use another "
            f"train.run_dir, or resume all the same with 'train.accept_changes=[{','.join(refused)}]'"
        )
    return [
        f"changed since the checkpoint: {name}: {saved[name]} -> {ours[name]}"
        + (" (accepted)" if kinds[name] == "identity" else "")
        for name in differing
    ]
