from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster, NoClusterHereError, start_cluster

NODES = 5  # four to train on and a spare


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    # Not below pytest's own folder, which munge's user may not enter.
    directory = Path(tempfile.mkdtemp(prefix="brc-", dir="/tmp"))
    cluster = Cluster(directory, NODES)
    try:
        start_cluster(directory, NODES)
    except NoClusterHereError as error:
        shutil.rmtree(directory, ignore_errors=True)
        pytest.skip(f"no Slurm cluster can be brought up on this machine: {error}")
    except BaseException:
        cluster.verb("down", check=False)
        raise
    yield cluster
    cluster.verb("down")
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """A real Slurm cluster: node1 ... node5, all idle."""
    yield session_cluster
    session_cluster.reset()
