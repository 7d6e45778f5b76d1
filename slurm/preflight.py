"""The check of all nodes before training, with one process per node:

    srun --ntasks-per-node=1 python -m biroute.slurm.preflight RUN_DIR CONFIG

Each process checks its own node (`node_check`). Then all of them connect to the first node and perform a small
all-reduce with a time-out. The verdict lists every bad node with its problems and is written to
`preflight/<node>.json` in the attempt's logs. It is read at the end of the attempt, and the next attempt avoids the
bad nodes. Exit status: 0 if all nodes are good, 1 if there are bad nodes, 2 for a usage error.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from biroute.configs.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE_ERROR, UsageError
from biroute.configs.files import write_atomically
from biroute.configs.load import load_config
from biroute.launcher.attempts.failures import Failure, write_failure
from biroute.launcher.attempts.journal import fencing_token_of, given_attempt
from biroute.launcher.attempts.run_files import PREFLIGHT, log_dir
from biroute.launcher.ranks.environment import RankEnvironment, expand_nodes, find_rank_environment
from biroute.launcher.ranks.gpu_check import gpu_problems
from biroute.launcher.ranks.rendezvous import port_in_use
from biroute.slurm.node_check import Findings, inspect_node, judge

_CLOCK_ROUNDS = 5  # the smallest difference counts, since a busy machine may answer late but never early
_POLL_SECONDS = 0.05
_REDUCE_SHARE = 0.25  # fraction of the total time that is reserved for the all-reduce


class Meeting:
    """Communication between the nodes through a key-value store on the first node."""

    def __init__(self, environment: RankEnvironment, seconds: float) -> None:
        self.environment = environment
        self._deadline = time.monotonic() + seconds
        self._reduce_seconds = max(5.0, seconds * _REDUCE_SHARE)
        left = timedelta(seconds=seconds)
        self._store = dist.TCPStore(
            environment.address,
            environment.port,
            environment.world_size,
            environment.rank == 0,
            timeout=left,
            wait_for_workers=False,
        )

    def publish(self, what: str, text: str) -> None:
        """Publish `text` under this node's rank."""
        self._store.set(f"{what}/{self.environment.rank}", text)

    def gather(self, what: str) -> dict[int, str]:
        """Collect what the nodes published, by rank, leaving out nodes that were late. Called by rank 0."""
        ranks = range(self.environment.world_size)
        missing = set(ranks)
        reserved = self._reduce_seconds if what == "findings" else 0.0  # time for the all-reduce that follows
        while missing and time.monotonic() < self._deadline - reserved:
            missing = {rank for rank in missing if not self._store.check([f"{what}/{rank}"])}
            time.sleep(_POLL_SECONDS if missing else 0.0)
        return {rank: self._store.get(f"{what}/{rank}").decode() for rank in ranks if rank not in missing}

    def broadcast(self, what: str, text: str) -> None:
        """Broadcast `text` from rank 0."""
        self._store.set(what, text)

    def receive(self, what: str) -> str:
        """Wait for the text that rank 0 broadcasts."""
        left = max(1.0, self._deadline - time.monotonic() + 2 * self._reduce_seconds)
        self._store.wait([what], timedelta(seconds=left))
        return self._store.get(what).decode()

    def reduce(self) -> tuple[str, float]:
        """Perform a small all-reduce.

        Returns:
            The error on this node, or "" if it worked; and by how many seconds its clock is ahead of rank 0's.
        """
        limit = timedelta(seconds=self._reduce_seconds)
        try:
            store = dist.PrefixStore("reduce", self._store)
            dist.init_process_group(
                "gloo", store=store, rank=self.environment.rank, world_size=self.environment.world_size, timeout=limit
            )
            total = torch.arange(1000, dtype=torch.float64) + self.environment.rank
            dist.all_reduce(total)
            ranks = self.environment.world_size
            if not torch.equal(total, torch.arange(1000, dtype=torch.float64) * ranks + ranks * (ranks - 1) / 2):
                return "its result is wrong", 0.0
            return "", min((self._compare_clock() for _ in range(_CLOCK_ROUNDS)), key=abs)
        except Exception as error:
            return " ".join(str(error).split()), 0.0

    def _compare_clock(self) -> float:
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64)
        first = now.clone()
        dist.broadcast(first, src=0)
        return float(now - first)


def check_nodes(
    environment: RankEnvironment, nodes: Sequence[str], mine: Findings, seconds: float
) -> dict[str, list[str]]:
    """Find the bad nodes of the job; collective over all nodes.

    Args:
        environment: rank and address of this process.
        nodes: names of all nodes, by rank.
        mine: what this node reports about itself.
        seconds: time for the whole check.

    Returns:
        For each bad node, a list of its problems.

    Raises:
        dist.DistError: the first node can't be reached.
    """
    meeting = Meeting(environment, seconds)
    meeting.publish("findings", json.dumps(asdict(mine)))
    findings = []
    if environment.rank == 0:
        findings = [Findings(**json.loads(text)) for text in meeting.gather("findings").values()]
        meeting.broadcast("all here", str(len(findings) == environment.world_size))
    reach: dict[int, str] | None = None
    clocks: dict[int, float] = {}
    if meeting.receive("all here") == "True" and environment.world_size > 1:
        error, ahead = meeting.reduce()
        meeting.publish("reduced", json.dumps([error, ahead]))
        if environment.rank == 0:
            said = {rank: json.loads(text) for rank, text in meeting.gather("reduced").items()}
            reach = {rank: said[rank][0] if rank in said else "no answer" for rank in range(environment.world_size)}
            clocks = {rank: said[rank][1] for rank in said if not any(reach.values())}
    if environment.rank == 0:
        meeting.broadcast("verdict", json.dumps(judge(nodes, findings, reach, clocks)))
    verdict: dict[str, list[str]] = json.loads(meeting.receive("verdict"))
    meeting.publish("left", "")
    if environment.rank == 0:
        meeting.gather("left")  # the store ends with this process, so rank 0 leaves last
    return verdict


def preflight(run_dir: Path, config_path: Path) -> int:
    """Check this node and the others, write the verdict and return the exit status."""
    config = load_config(config_path)
    environment = find_rank_environment()
    attempt = given_attempt() or fencing_token_of(run_dir)
    folder = log_dir(run_dir, attempt) / PREFLIGHT
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    listed = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
    nodes = (
        listed
        if len(listed) == environment.world_size
        else [f"node {rank}" for rank in range(environment.world_size)]
    )
    mine = inspect_node(environment.rank, host, run_dir, attempt, config)
    if config.train.device == "cuda":
        facts = {**mine.facts, "CUDA of torch": str(torch.version.cuda)}
        mine = replace(mine, facts=facts, problems=[*mine.problems, *gpu_problems(config.slurm.ranks_per_node or 1)])
    _write(folder, nodes[environment.rank], [*mine.problems])
    try:
        bad = check_nodes(environment, nodes, mine, config.slurm.preflight_timeout_seconds)
    except dist.DistError as error:
        if environment.rank == 0 and port_in_use(error):
            text = f"port {environment.port} on {host} is in use; the next attempt uses another"
            write_failure(log_dir(run_dir, attempt), Failure(0, host, time.time(), 0, "error", text))
            print(f"preflight: {text}", file=sys.stderr)
            return EXIT_FAILURE
        # If the first node has written its file, it is alive and reports the missing nodes itself.
        if not (folder / f"{nodes[0]}.json").exists():
            _write(
                folder,
                nodes[0],
                [f"{nodes[environment.rank]} could not reach it at {environment.address}:{environment.port}"],
            )
        print(
            f"preflight: {nodes[0]} at {environment.address}:{environment.port} can't be reached: {error}",
            file=sys.stderr,
        )
        return EXIT_FAILURE
    for node, problems in bad.items():
        # A bad node may be unable to write, so every node writes the same files.
        _write(folder, node, problems)
        if environment.rank == 0 or node == nodes[environment.rank]:
            print(f"preflight: node {node}: {'; '.join(problems)}", file=sys.stderr)
    return EXIT_FAILURE if bad else EXIT_OK


def _write(folder: Path, node: str, problems: Sequence[str]) -> None:
    # The parent is not created: on a node that does not see the shared folder, it would be a different folder.
    with contextlib.suppress(OSError):
        if folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
            record = json.dumps({"host": node, "problems": list(problems)}).encode()
            write_atomically(folder / f"{node}.json", record, durable=False, unique=True)


def main() -> None:
    try:
        status = preflight(Path(sys.argv[1]), Path(sys.argv[2]))
    except (UsageError, IndexError) as error:
        text = "use: preflight RUN_DIR CONFIG" if isinstance(error, IndexError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        status = EXIT_USAGE_ERROR
    sys.stderr.flush()
    os._exit(status)  # skips gloo's teardown, which may wait for a bad node


if __name__ == "__main__":
    main()
