"""What a submission freezes besides what the user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run

from biroute.slurm.submit import prepare


@pytest.mark.parametrize(
    ("gpus", "overrides", "device"), [(2, [], "cuda"), (2, ["train.device=cpu"], "cpu"), (0, [], "auto")]
)
def test_a_cluster_with_gpus_trains_on_gpus(
    corpus: Path, tmp_path: Path, gpus: int, overrides: list[str], device: str
) -> None:
    """With train.device=auto a node whose GPU does not work would train on its CPU."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"gpus_per_node": gpus}))
    config = tmp_path / "run.yaml"
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={"data": 2})
    config.write_text(yaml.safe_dump(tree | {"slurm": {"profile": str(profile)}}))
    assert prepare(config, overrides, tmp_path).config.train.device == device
