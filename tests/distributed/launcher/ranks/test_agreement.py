"""Ranks that would train different things refuse to, all of them, and name what differs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import RankFailedError, WorkerPool

Ranks = Callable[[int], WorkerPool]


def agree_job(trees: list[dict[str, Any]], code: str | None) -> str:
    """Compare the configurations `trees[rank]`; `code` replaces the hash of the code of the last rank."""
    import torch.distributed as dist

    from biroute.configs.errors import UsageError
    from biroute.configs.load import config_from_tree
    from biroute.launcher.ranks.agreement import check_same, run_facts

    facts = run_facts(config_from_tree(trees[dist.get_rank()], "test"))
    if code and dist.get_rank() == dist.get_world_size() - 1:
        facts["checksum of BiRoute's code"] = code
    try:
        check_same(facts)
    except UsageError as error:
        return str(error)
    return "agreed"


def test_ranks_of_one_configuration_agree(ranks: Ranks) -> None:
    trees: list[dict[str, Any]] = [{"data": {"dir": f"/scratch/{rank}"}} for rank in range(3)]
    assert ranks(3).run(agree_job, trees, None) == ["agreed"] * 3, "a node may have its own copy of a dataset"


@pytest.mark.parametrize(
    ("tree", "code", "expected"),
    [
        (
            {"optim": {"learning_rate": 0.25}},
            None,
            "rank 2 on {host} has optim.learning_rate=0.25, but rank 0 on {host}",
        ),
        ({"data": {"seed": 7}}, None, "rank 2 on {host} has data.seed=7, but rank 0 on {host} has data.seed=0"),
        ({}, "feed", "rank 2 on {host} has checksum of BiRoute's code=feed"),
        (
            {"optim": {"beta1": 0.5, "beta2": 0.6, "weight_decay": 0.5, "gradient_clip": 7.0}},
            None,
            "has optim.beta1=0.5, optim.beta2=0.6, optim.gradient_clip=7.0 and 1 more, but",
        ),
    ],
)
def test_the_rank_and_the_field_that_differ_are_named(
    ranks: Ranks, tree: dict[str, Any], code: str | None, expected: str
) -> None:
    (message, *others) = ranks(3).run(agree_job, [{}, {}, tree], code)
    assert expected.format(host=socket.gethostname()) in message
    assert others == [message] * 2, "every rank says the same"
    assert "\n" not in message


def other_dataset_job(tree: dict[str, Any], folder: str) -> str:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        tree = {**tree, "data": {**tree["data"], "dir": folder}}
    return run_job(tree)


def test_ranks_with_different_datasets_do_not_train(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    """The same sizes and tokenizer, but another manifest: a copy on one node that was not brought up to date."""
    from biroute.data_pipeline.read.manifest import load_manifest, to_json

    other = tmp_path / "dataset"
    other.mkdir()
    for path in (corpus / "dataset").iterdir():
        os.symlink(path, other / path.name)
    manifest = load_manifest(other)
    (other / "manifest.json").unlink()
    source = manifest.sources[0].model_copy(update={"key": "older"})
    changed = manifest.model_copy(update={"sources": (source, *manifest.sources[1:])}).sealed()
    (other / "manifest.json").write_bytes(to_json(changed))
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={"data": 2})
    with pytest.raises(
        RankFailedError, match=r"rank 1 on \S+ has checksum of the dataset's manifest=\w{12}, but rank 0"
    ):
        ranks(2).run(other_dataset_job, tree, str(other))
    assert points_of(tmp_path / "run") == []
