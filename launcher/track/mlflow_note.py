"""Descriptions in MLflow: written by us, and left alone once a person has changed them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

_NOTE = "mlflow.note.content"
_FINGERPRINT = "biroute.note"  # of the description that we wrote


def note_tags(note: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that set a description; none if a person has written the one among the `known` tags."""
    if known.get(_NOTE) and known.get(_FINGERPRINT) != _fingerprint(known[_NOTE]):
        return {}
    return {_NOTE: note, _FINGERPRINT: _fingerprint(note)}


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
