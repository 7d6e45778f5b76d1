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


@pytest.mark.parametrize(("save_seconds", "warnings"), [(80.0, 0), (121.0, 1)])
def test_too_little_time_before_the_limit_is_told_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float, warnings: int
) -> None:
    """A step is waited for, then comes the save: if the limit is nearer than that, both are lost."""
    config = config_from_tree(small_run(corpus, tmp_path / "run", steps=2, parallel={}), "test")
    (tmp_path / "run").mkdir()
    token = FencingToken(tmp_path / "run", begin_attempt(tmp_path / "run", nodes=["here"], world_size=1))
    said: list[str] = []
    monkeypatch.setattr(observer.Observer, "on_message", lambda self, text: said.append(text))
    watching = observer.Observer(config, resolve_layout(config, 1), open_dataset(config), token, None)
    step = {"train/loss": 1.0, "time/step_seconds": 39.0, "throughput/tokens_per_second": 1.0}
    watching.on_step(1, step)
    watching.on_save(1, tmp_path, save_seconds)
    assert not said, "not in a job"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    watching.on_save(1, tmp_path, save_seconds)
    watching.on_save(2, tmp_path, save_seconds)
    watching.on_end("FINISHED", "")
    assert len(said) == warnings
    for text in said:
        assert "a step (39 s) and a save (121 s) take longer than slurm.signal_seconds=120" in text
        assert "slurm.signal_seconds=360" in text
