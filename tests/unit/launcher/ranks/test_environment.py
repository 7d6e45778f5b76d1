"""A rank's place from the variables of torchrun, of the local launcher and of srun."""

from __future__ import annotations

import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.ranks.environment import (
    RankEnvironment,
    expand_nodes,
    find_rank_environment,
    port_of_job,
    started_by_launcher,
)

SRUN = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_NODELIST": "node[06-08]",
    "SLURM_NTASKS": "12",
}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,15],gpu7", ["n08", "n09", "n10", "n15", "gpu7"]),
        ("rack[1-2]-n[1-2].local", ["rack1-n1.local", "rack1-n2.local", "rack2-n1.local", "rack2-n2.local"]),
    ],
)
def test_list_of_nodes(text: str, nodes: list[str]) -> None:
    assert expand_nodes(text) == nodes


def test_srun() -> None:
    ours = RankEnvironment(5, 1, 8, "node07", port_of_job(12345, 1), port_of_ours=True)
    assert find_rank_environment(SRUN) == ours
    ports = {find_rank_environment(SRUN | {"BIROUTE_ATTEMPT": str(attempt)}).port for attempt in range(1, 9)}
    assert len(ports | {ours.port}) == 9, "a port that is taken must not be asked for again"
    assert find_rank_environment(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}).address == "10.0.0.1"
    assert find_rank_environment(SRUN | TORCHRUN).rank == 3, "torchrun inside a step of srun"


def test_torchrun_and_the_local_launcher() -> None:
    assert find_rank_environment(TORCHRUN) == RankEnvironment(3, 1, 4, "head", 29500)
    local = {"RANK": "1", "WORLD_SIZE": "2", "BIROUTE_RENDEZVOUS_FILE": "/tmp/x"}
    assert find_rank_environment(local) == RankEnvironment(1, 1, 2, file="/tmp/x")


def test_only_srun_with_several_tasks_makes_this_process_a_rank() -> None:
    assert started_by_launcher(SRUN)
    assert started_by_launcher(TORCHRUN)
    assert not started_by_launcher({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"}), "a batch script"
    assert not started_by_launcher(SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}), "srun --pty bash"


def test_ports_stay_in_range_and_differ_between_neighbours() -> None:
    ports = {port_of_job(job, step) for job in range(1, 100) for step in range(3)}
    assert min(ports) >= 20_000
    assert max(ports) < 32_768
    assert len(ports) == 297


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a whole number"),
        ({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 is not below the number of ranks, 4"),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST is not"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-x]"}, "is not a list of nodes"),
    ],
)
def test_what_contradicts_itself_is_one_clear_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_rank_environment(environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
