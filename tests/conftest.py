from __future__ import annotations

from pathlib import Path

import pytest
from helpers.corpus import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small real dataset, built once a session."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))
