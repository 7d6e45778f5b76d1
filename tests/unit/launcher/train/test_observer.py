"""What rank 0 tells MLflow of a run before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.corpus import small_run

from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.data_pipeline.dataset import open_dataset
from biroute.launcher.attempts.journal import FencingToken, begin_attempt
from biroute.launcher.plan.cluster import plan_on_cluster
from biroute.launcher.train import observer


@pytest.mark.parametrize("hardware", ["h100", "h99", None])
def test_the_plan_of_the_clusters_nodes_goes_with_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: str | None
) -> None:
    """A profile that cannot be read any more must not keep a run from training."""
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"hardware": hardware} if hardware else {}))
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={})
    config = config_from_tree(tree | {"slurm": {"profile": str(tmp_path / "cluster.yaml")}}, "test")
    layout = resolve_layout(config, 1)
    given: dict[str, Any] = {}
    real = observer.open_tracker

    def keep(*arguments: Any, tags: dict[str, str], **rest: Any) -> Any:
        given.update(tags)
        return real(*arguments, tags=tags, **rest)

    monkeypatch.setattr(observer, "open_tracker", keep)
    (tmp_path / "run").mkdir()
    token = FencingToken(tmp_path / "run", begin_attempt(tmp_path / "run", nodes=["here"], world_size=1))
    said: list[str] = []
    monkeypatch.setattr(observer.Observer, "on_message", lambda self, text: said.append(text))
    observer.Observer(config, layout, open_dataset(config), token, None).on_end("FINISHED", "")
    planned = {name: value for name, value in given.items() if name.startswith("plan.")}
    assert given["world_size"] == "1"
    if hardware == "h100":
        plan = plan_on_cluster(config, layout)
        assert plan is not None
        assert float(planned["plan.step_seconds"]) == pytest.approx(plan.step.total, rel=1e-5)
        assert float(planned["plan.seconds"]) == pytest.approx(2 * plan.step.total, rel=1e-5)
        assert planned["plan.device"] == "NVIDIA H100 SXM5 80 GB"
    else:
        assert not planned
    assert bool(said) == (hardware == "h99"), said
