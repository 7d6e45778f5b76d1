"""Fixtures that several unit tests share."""

from __future__ import annotations

import pytest
from helpers.corpora import data_config, run_config

from biroute.configs.data_section import DataConfig
from biroute.data_pipeline.dataset import Dataset, open_dataset
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A dataset that tests read but do not change."""
    data = data_config(tmp_path_factory.mktemp("built"))
    build_dataset(data, Progress(quiet=True))
    return data


@pytest.fixture(scope="session")
def dataset(built: DataConfig) -> Dataset:
    """The same, opened for sequences of 64 tokens."""
    return open_dataset(run_config(built))
