"""Identity of a run: the fields that its checkpoints are checked against, and a one-line summary. No torch."""

from __future__ import annotations

import getpass
import os
import socket
from importlib import metadata
from typing import Any

from biroute.configs.changes import settings_to_compare
from biroute.configs.layout import Layout
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.dataset import Dataset
from biroute.model.flops import parameter_count

TOKENIZER_FINGERPRINT = "tokenizer fingerprint"
_SHAPE_FIELDS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "ffn_hidden_size",
    "qk_norm",
    "key_smear",
    "tied_embeddings",
    "objective",
)


def model_identity(config: RunConfig, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Return the fields that must be equal in two runs for one to load the other's weights."""
    model = config.model.model_dump(mode="json")
    return {
        **{f"model.{name}": model[name] for name in _SHAPE_FIELDS},
        "vocabulary": config.padded_vocab_size,
        TOKENIZER_FINGERPRINT: tokenizer_fingerprint[:12],
    }


def about_run(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what a checkpoint says of its run: its model, and the settings that a resume compares."""
    return {
        "model": model_identity(config, dataset.manifest.tokenizer_fingerprint),
        "settings": settings_to_compare(config, dataset.manifest.tokens_checksum()[:12]),
        "accepted": list(config.train.accept_changes),
    }


def describe(config: RunConfig, layout: Layout) -> str:
    """Summarize size, layout and length of a run, for the first line that it prints."""
    return (
        f"{parameter_count(config) / 1e6:.2f} M parameters, {layout}, {config.train.precision}, "
        f"{config.tokens_per_step:,} tokens per step, {config.train.steps:,} steps"
    )


def writer(attempt: int) -> str:
    """Say who writes the checkpoints of an attempt: user, machine, attempt and version."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return f"{user} on {socket.gethostname()}, attempt {attempt}, BiRoute {metadata.version('biroute')}"
