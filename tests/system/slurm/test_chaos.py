"""`make chaos`: one run through ten faults at seeded random points equals a run that was never disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from helpers.faults import FIRST, OTHERS, Fault
from helpers.slurm_cluster import SCRIPT, Cluster, wait_for
from helpers.slurm_runs import ClusterRun, losses, submit, train_undisturbed, write_run

from ..conftest import Answer
from ..test_train import only_run

Command = Callable[..., Answer]
STEPS, CHECKPOINT_EVERY = 600, 15
ENOUGH = {"max_restarts": 50, "max_crashes_at_same_step": 5}
# A stop that was asked for saves at the next step boundary; everything else falls back to a checkpoint.
SAVED_IN_TIME = {"USR1 before the limit", "preemption", "TERM during evaluation", "TERM during a save"}


@dataclass(frozen=True)
class Outcome:
    """What one fault did."""

    fault: str
    attempt: int  # the one that it struck
    step: int  # the last step before it
    resumed_after: int
    seconds: float  # from the fault to the end of the next attempt's first step

    @property
    def lost(self) -> int:
        return self.step - self.resumed_after


def put_through(run: ClusterRun, fault: Fault, random: Random) -> Outcome:
    """Wait for the fault's moment, strike, wait until the run trains again, clear up."""
    fault.moment(run, random)
    struck, number, step = time.monotonic(), run.attempts[-1].number, run.step()
    clear_up = fault.strike(run, random)
    run.wait_for_attempt(number + 1)
    clear_up()
    run.wait_for_training(run.attempts[-1].number)
    newest = run.attempts[-1].number
    run.wait_for_training(newest)
    return Outcome(fault.name, number, step, run.resumed_after(newest), time.monotonic() - struck)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [0])
def test_ten_faults_in_one_run(
    seed: int, cluster: Cluster, corpus: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "checkpoint": {"every_steps": CHECKPOINT_EVERY},
        "train": {"evaluate_every": 25, "evaluate_sequences": 100, "hang_seconds": 120.0},
        "slurm": ENOUGH,
    }
    parallel = {"data": 2, "zero_stage": 1}
    random = Random(seed)
    faults = [FIRST, *random.sample(OTHERS, len(OTHERS))]
    assert len(faults) == 10
    run = submit(cluster, command, write_run(corpus, tmp_path, "chaos", steps=STEPS, parallel=parallel, **changes), 2)
    outcomes = []
    for fault in faults:
        outcomes.append(put_through(run, fault, random))
        with capsys.disabled():
            print(tell(outcomes[-1]), flush=True)
    run.wait_for_end(600)

    attempts = run.attempts
    with capsys.disabled():
        print(*(f"attempt {attempt.number}: {attempt.cause}" for attempt in attempts), sep="\n", flush=True)
    assert attempts[-1].decision == "finished", run.story()
    assert all(attempt.cause for attempt in attempts), run.story()
    for outcome in outcomes:
        if outcome.fault in SAVED_IN_TIME:
            # The step in hand is finished, and with it the state saved: nothing is done twice.
            assert outcome.resumed_after >= outcome.step, outcome
            assert attempts[outcome.attempt - 1].step == outcome.resumed_after, outcome
        assert outcome.lost <= CHECKPOINT_EVERY, outcome

    plain = write_run(corpus, tmp_path, "plain", steps=STEPS, parallel=parallel, **changes)
    assert losses(run.run_dir) == train_undisturbed(plain), "bit for bit"
    assert sorted(losses(run.run_dir)) == list(range(1, STEPS + 1))
    mlflow_run, client = only_run(run.run_dir)
    assert mlflow_run.info.status == "FINISHED"
    history = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1)), "each step once, in one run"
    for attempt in attempts[:-1]:
        assert attempt.cause in mlflow_run.data.tags[f"attempt.{attempt.number:04d}"]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_bytes_on_the_cables_are_those_that_training_counts(
    cluster: Cluster, corpus: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that differ in their sequences per step alone: start, gradients and ZeRO cancel out."""
    steps, sent, counted = 6, [], []
    for sequences in (4, 16):
        config = write_run(
            corpus, tmp_path, f"batch{sequences}", steps=steps, parallel={"region": 2},
            model={"hidden_size": 128, "sequence_length": 1024},  # messages that dwarf their headers
            train={"global_batch_size": sequences, "microbatch_size": 4, "evaluate_every": 0},
            checkpoint={"every_steps": 0},
        )  # fmt: skip
        before = cluster.bytes_sent()
        run = submit(cluster, command, config, 2)
        run.wait_for_end(600)
        assert run.attempts[-1].decision == "finished", run.story()
        sent.append(sum(cluster.bytes_sent()[node] - before[node] for node in before))
        points = [json.loads(line)["metrics"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        # Mean over the ranks of what each received in one step.
        counted.append(sum(2 * point["exchange/region_bytes"] for point in points if "train/loss" in point))
    on_cables, in_metrics = sent[1] - sent[0], counted[1] - counted[0]
    with capsys.disabled():
        print(
            f"12 more sequences a step, bytes per step between two nodes: {on_cables / steps:,.0f} on the cables, "
            f"{in_metrics / steps:,.0f} in metrics, ratio {on_cables / in_metrics:.3f}"
        )
    assert in_metrics > 1_000_000, "enough to measure"
    assert on_cables == pytest.approx(in_metrics, rel=0.1)


def tell(outcome: Outcome) -> str:
    """A line of the report."""
    return (
        f"{outcome.fault:28} struck attempt {outcome.attempt} after step {outcome.step}: resumed after step "
        f"{outcome.resumed_after}, training again after {outcome.seconds:.0f} s"
    )


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("nodes", "parallel"),
    [
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {"region": 2}),
        (4, {"tensor": 2, "data": 2}),
        (4, {"region": 2, "pipeline": 2}),
    ],
    ids=lambda value: "-".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else None,
)
def test_axes_across_nodes_equal_one_machine(
    nodes: int, parallel: dict[str, int], cluster: Cluster, corpus: Path, tmp_path: Path, command: Command
) -> None:
    plain = write_run(corpus, tmp_path, "plain", steps=8, parallel=parallel)
    undisturbed = train_undisturbed(plain)
    run = submit(cluster, command, write_run(corpus, tmp_path, "nodes", steps=8, parallel=parallel), nodes)
    run.wait_for_end(600)
    assert run.attempts[-1].decision == "finished", run.story()
    assert len(set(run.attempts[-1].nodes)) == nodes
    assert losses(run.run_dir) == undisturbed


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_the_time_limit_itself(cluster: Cluster, corpus: Path, tmp_path: Path, command: Command) -> None:
    """Slurm's own USR1 and requeue, and a run that is cancelled rather than queued again."""
    config = write_run(corpus, tmp_path, "limit", steps=100_000, parallel={"data": 2})
    run = submit(cluster, command, config, 2, "slurm.time_limit=4", "slurm.signal_seconds=60")
    run.wait_for_attempt(2, 600)
    assert "USR1" in run.attempts[0].cause, run.story()
    run.wait_for_training(2)
    assert run.resumed_after(2) == run.attempts[0].step
    on = {"SLURM_CONF": str(cluster.directory / "slurm.conf")}
    assert command("cancel", run.run_dir, **on).status == 0
    run.wait_for_end()
    last = run.attempts[-1]
    assert (last.number, last.status, last.decision) == (2, 75, "stop"), run.story()
    wait_for(lambda: not cluster.client("squeue", "-h"), 60, "nothing to be queued again")
    assert "cancelled" in command("status", run.run_dir, **on).out


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_two_machines_by_hand_without_slurm(cluster: Cluster, corpus: Path, tmp_path: Path, command: Command) -> None:
    """torchrun's way: the same command on each machine."""
    plain = write_run(corpus, tmp_path, "plain", steps=6, parallel={"region": 2})
    undisturbed = train_undisturbed(plain)
    config = write_run(corpus, tmp_path, "by-hand", steps=6, parallel={"region": 2})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    address = ["--master-addr=node1", "--master-port=29500", "-m", "biroute.launcher.start.worker", str(config)]
    environment = {**cluster.environment, "DEV_CLUSTER_DIR": str(cluster.directory), "GLOO_SOCKET_IFNAME": "eth0"}
    machines = [
        subprocess.Popen(
            [str(SCRIPT), "exec", f"node{rank + 1}", *torchrun, f"--node-rank={rank}", *address], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [machine.wait(600) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    assert losses(config.parent / "runs" / "by-hand") == undisturbed
