"""Submit the sizes of a study as Slurm jobs. The same command later collects what has ended. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from biroute.configs.cluster_profile import load_profile
from biroute.configs.errors import UsageError
from biroute.configs.load import write_config
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.run_files import SUBMISSION
from biroute.launcher.scale.measure import is_finished
from biroute.launcher.scale.study import Size, Study
from biroute.slurm.submit import check_request, prepare, submit_run


def on_nodes(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration with the nodes that so many ranks take.

    A node has `slurm.ranks_per_node` ranks, or the profile's GPUs; a smaller size runs on one node. Without either,
    the ranks are dealt out to `slurm.nodes`.

    Raises:
        UsageError: the ranks do not fill the nodes, or the profile is not usable.
    """
    slurm = config.slurm
    per_node = slurm.ranks_per_node or load_profile(slurm.profile).gpus_per_node
    if not per_node:
        nodes = slurm.nodes if ranks % slurm.nodes == 0 else 0
        per_node = ranks // nodes if nodes else 0
        remedy = f"slurm.nodes={slurm.nodes} does not divide it; set slurm.ranks_per_node"
    else:
        per_node = min(per_node, ranks)
        nodes = ranks // per_node if ranks % per_node == 0 else 0
        remedy = f"not a multiple of the {per_node} ranks of a node; use multiples, or set slurm.ranks_per_node"
    if not nodes:
        raise UsageError(f"--ranks {ranks}: {remedy}")
    return config.model_copy(update={"slurm": slurm.model_copy(update={"nodes": nodes, "ranks_per_node": per_node})})


def submit_sizes(study: Study, config_of: Callable[[Size], RunConfig], say: Callable[[str], None]) -> None:
    """Submit each size that is neither finished nor submitted yet.

    Args:
        study: what is to be trained.
        config_of: the configuration of a size, with its place in MLflow.
        say: takes lines for people.

    Raises:
        UsageError: a size cannot run on this cluster, or Slurm refuses it. What was submitted before stays.
    """
    wanted = []
    for size in study.sizes:
        if is_finished(size):
            say(f"{size.name}: finished, in {size.run_dir}")
        elif (size.run_dir / SUBMISSION).exists():
            say(f"{size.name}: submitted before; `biroute status {size.run_dir}` shows it")
        else:
            path = study.folder / f"{size.run_dir.name}.yaml"
            write_config(path, on_nodes(config_of(size), size.ranks))
            submission = prepare(path, [], Path.cwd())
            check_request(submission.request)
            wanted.append((size, submission))
    for size, submission in wanted:  # only after all of them are sound
        say(f"{size.name}: job {submit_run(submission)}, run folder {size.run_dir}")
