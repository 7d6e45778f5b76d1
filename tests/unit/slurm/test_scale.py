"""`biroute scale --slurm`: sizes become jobs, once each; the same command collects what has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run
from helpers.submissions import Commands
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree, load_config
from biroute.launcher.scale.command import scale_app
from biroute.launcher.scale.on_slurm import on_nodes


@pytest.mark.parametrize(
    ("ranks", "slurm", "expected"),
    [
        (2, {"ranks_per_node": 4}, (1, 2)),
        (8, {"ranks_per_node": 4}, (2, 4)),
        (16, {}, (2, 8)),  # the GPUs of a node
        (6, {"profile": "cpu", "nodes": 3}, (3, 2)),
    ],
)
def test_ranks_fill_nodes(ranks: int, slurm: dict[str, object], expected: tuple[int, int]) -> None:
    config = config_from_tree({"slurm": {"profile": "gpu"} | slurm}, "test")
    found = on_nodes(config, ranks).slurm
    assert (found.nodes, found.ranks_per_node) == expected


@pytest.mark.parametrize(
    ("ranks", "slurm", "message"),
    [
        (6, {"ranks_per_node": 4}, "--ranks 6: not a multiple of the 4 ranks of a node"),
        (4, {"profile": "cpu", "nodes": 3}, "--ranks 4: slurm.nodes=3 does not divide it; set slurm.ranks_per_node"),
        (4, {"profile": None}, "slurm.profile is empty"),
    ],
)
def test_ranks_that_fill_no_nodes_are_refused(ranks: int, slurm: dict[str, object], message: str) -> None:
    config = config_from_tree({"slurm": {"profile": "gpu"} | slurm}, "test")
    with pytest.raises(UsageError, match=message):
        on_nodes(config, ranks)


def test_each_size_is_submitted_once(corpus: Path, tmp_path: Path, commands: Commands) -> None:
    counter = tmp_path / "count"
    commands(
        "sbatch",
        f'case " $* " in *--test-only*) exit 0;; esac; echo x >> {counter}; echo $((10 + $(wc -l < {counter})))',
    )
    (tmp_path / "cluster.yaml").write_text("{}")
    tree = small_run(corpus, tmp_path / "runs" / "small", steps=8, parallel={})
    tree["slurm"] = {"profile": str(tmp_path / "cluster.yaml"), "ranks_per_node": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    words = [str(tmp_path / "small.yaml"), "--ranks", "1,2", "--steps", "6", "--slurm"]
    first = CliRunner().invoke(scale_app, words, catch_exceptions=False)
    assert first.exit_code == 0
    assert "1 rank: job 11" in first.output and "2 ranks: job 12" in first.output
    assert "run the same command again to collect" in first.output
    folder = tmp_path / "runs" / "small-weak-scaling"
    for size in (1, 2):
        frozen = load_config(folder / f"ranks-{size:04d}" / "submission" / "config.yaml")
        assert (frozen.slurm.nodes, frozen.parallel.data, frozen.train.steps) == (size, size, 6)
    again = CliRunner().invoke(scale_app, words, catch_exceptions=False)
    assert again.exit_code == 0 and "2 ranks: submitted before" in again.output
    assert len(counter.read_text().split()) == 2
