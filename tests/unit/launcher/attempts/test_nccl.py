"""What NCCL says, in exceptions and in logs of ranks that it ended: a hang, an error, or the loss of another rank.

The lines are those of public logs of torch 2.1 to 2.12; no NCCL ran here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.launcher.attempts.failures import (
    Failure,
    Heartbeat,
    explain_end,
    first_failure,
    format_first_failure,
    is_consequence,
    log_file,
    record_failure,
    write_failure,
    write_heartbeat,
)

SOURCE = "ProcessGroupNCCL.cpp"
TIMEOUT = (
    "[Rank {0}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=59958, OpType=ALLREDUCE, "
    "NumelIn=8388608, NumelOut=8388608, Timeout(ms)=1800000) ran for 1800077 milliseconds before timing out."
)
STACK = "".join(f"#{depth} function from /venv/torch/nn/modules/module.py:{depth}\n" for depth in range(9))
FRAMES = "".join(f"frame #{depth}: c10d::ProcessGroupNCCL + 0x57 (0x7f610c181d87)\n" for depth in range(40))
HANG = (
    f"step 7\n[rank{{0}}]:[E710 18:00:32.4 {SOURCE}:757] {TIMEOUT}\n"
    f"[rank{{0}}]:[E710 18:00:32.4 {SOURCE}:2395] [PG ID 0 PG GUID 0(default_pg) Rank {{0}}]  failure detected by "
    "watchdog at work sequence id: 59958 PG status: last enqueued work: 59998, last completed work: 59957\n"
    f"[rank{{0}}]:[E710 18:00:32.4 {SOURCE}:801] Stack trace of the failed collective: \n{STACK}\n"
    f"[rank{{0}}]:[E710 18:01:32.4 {SOURCE}:1895] [PG ID 0 PG GUID 0 Rank {{0}}] Process group watchdog thread "
    f"terminated with exception: {TIMEOUT}\nException raised from checkTimeout at /pytorch/{SOURCE}:632\n{FRAMES}\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
    "  what():  [PG ID 0 PG GUID 0 Rank {0}] Process group watchdog thread terminated with exception: "
    f"{TIMEOUT}\n{FRAMES}"
)
TERMINATED = (
    f"step 7\n[rank{{0}}]:[E323 21:33:26.1 {SOURCE}:1896] [PG ID 2 PG GUID 3 Rank {{0}}] Process group watchdog "
    f"thread terminated with exception: {{1}}\nException raised from somewhere at /pytorch/{SOURCE}:43\n{FRAMES}"
)
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, "
    "so the stacktrace below might be incorrect."
)
VERSION = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27\n{}\nLast error:\n{}"
)
SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
)
REMOTE = (
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)
CUDA = (
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.",
)
INTERNAL = (
    "internal error - please report this issue to the NCCL developers",
    "ncclInternalError: Internal check failed.",
)


def ranks(logs: Path, number: int) -> Path:
    for rank in range(number):
        write_heartbeat(logs, Heartbeat(rank, f"n{rank // 8}", 1, 100.0 + rank, 7, "training"))
        log_file(logs, rank).write_text("step 7\n")
    return logs


def say(logs: Path, rank: int, text: str, *words: object) -> None:
    log_file(logs, rank).write_text(text.format(rank, *words))


def test_ranks_that_nccl_ended_in_a_hang(tmp_path: Path) -> None:
    """All but the one that the others waited for; more than are named."""
    logs = ranks(tmp_path, 12)
    for rank in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11):
        say(logs, rank, HANG)
    end = explain_end(logs, 134)
    assert end.cause == (
        "hang: NCCL's ALLREDUCE (number 59958 of its group) did not end within 1800 s on rank 0 on n0, and likewise "
        "on 10 more; none timed out on rank 9 on n1, so the others may wait for that"
    )
    assert (end.step, end.crash) == (7, True)
    first = first_failure(logs)
    assert first is not None
    assert (first.kind, first.rank) == ("hang", 0)
    shown = format_first_failure(logs).splitlines()
    assert shown[0] == end.cause
    assert "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=59958" in shown[1]
    assert any("#0 function from" in line for line in shown), "where that collective was called"
    assert len(shown) == 26


def test_one_rank_alone_tells_the_hang(tmp_path: Path) -> None:
    """The others were killed when it ended, or lost their connection."""
    logs = ranks(tmp_path, 3)
    say(logs, 2, HANG)
    write_failure(logs, Failure(0, "n0", 1.0, 8, "peer", "RuntimeError: Connection closed by peer"))
    assert explain_end(logs, 134).cause == (
        "hang: NCCL's ALLREDUCE (number 59958 of its group) did not end within 1800 s on rank 2 on n0; "
        "none timed out on rank 1 on n0, so the others may wait for that"
    )


def test_an_error_comes_before_the_hang_that_follows(tmp_path: Path) -> None:
    logs = ranks(tmp_path, 6)
    for rank in (0, 1, 2, 3, 5):
        say(logs, rank, HANG)
    say(logs, 4, TERMINATED, ILLEGAL)
    cause = "rank 4 on n0: CUDA error: an illegal memory access was encountered"
    assert explain_end(logs, 134).cause == cause
    assert format_first_failure(logs).startswith(f"{cause}\n")
    write_failure(logs, Failure(1, "n0", 1.0, 8, "error", "ValueError: boom"))
    assert explain_end(logs, 1).cause == "rank 1 on n0: ValueError: boom", "what a rank recorded comes first"


def test_ranks_whose_nccl_lost_another_are_no_cause(tmp_path: Path) -> None:
    logs = ranks(tmp_path, 3)
    for rank in (0, 1):
        say(logs, rank, TERMINATED, VERSION.format(*REMOTE, "socketProgress: Connection closed by remote peer n1"))
    assert "ended without recording anything" in explain_end(logs, 137).cause
    assert first_failure(logs) is None


def test_a_rank_that_slurm_killed_is_told_beside_the_hang(tmp_path: Path) -> None:
    logs = ranks(tmp_path, 2)
    say(logs, 0, HANG)
    end = explain_end(logs, 137, said=["srun: error: n1: task 1: Out Of Memory"])
    assert end.cause.startswith("hang: NCCL's ALLREDUCE")
    assert "memory ran out; " in end.cause


def test_logs_of_very_many_ranks_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from biroute.launcher.attempts import failures

    monkeypatch.setattr(failures, "_LOGS_READ", 4)
    logs = ranks(tmp_path, 10)
    for rank in range(5, 10):  # a group of neighbours, such as the last stage of a pipeline
        say(logs, rank, HANG)
    read = []
    find = failures.find_abort
    monkeypatch.setattr(failures, "find_abort", lambda log: read.append(log.name) or find(log))
    assert "hang: NCCL's ALLREDUCE" in explain_end(logs, 134).cause
    assert read == [f"rank-{rank:05d}.log" for rank in (0, 3, 6, 9)]


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    logs = ranks(tmp_path, 1)
    log_file(logs, 0).write_text(TIMEOUT.format(0) + "\n" + "step 8\n" * 60_000)
    assert first_failure(logs) is None
    log_file(logs, 0).write_text("step 8\n" * 60_000 + HANG.format(0))
    first = first_failure(logs)
    assert first is not None
    assert first.kind == "hang"
    log_file(logs, 0).unlink()
    assert first_failure(logs) is None


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (VERSION.format(*REMOTE, "socketProgress: Connection closed by remote peer n1<4242>"), "peer", ""),
        (VERSION.format(*REMOTE, "NET/IB: Got completion from peer 10.0.0.1 with status=12"), "peer", ""),
        (VERSION.format(*SYSTEM, "Connect to 10.0.0.1<4242> failed : Connection refused"), "peer", ""),
        (VERSION.format(*INTERNAL, "Net : connection closed by remote peer n1<4242>"), "peer", ""),
        ("NCCL communicator was aborted on rank 2. ", "peer", ""),
        (
            VERSION.format(*SYSTEM, "Call to ibv_modify_qp failed with 110 Connection timed out"),
            "error",
            "DistBackendError: ncclSystemError: Call to ibv_modify_qp failed with 110 Connection timed out",
        ),
        (
            VERSION.format(*SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-x (No space left)"),
            "error",
            "ncclSystemError: Error while creating shared memory segment /dev/shm/nccl-x (No space left)",
        ),
        (
            VERSION.format(*CUDA, "Cuda failure 217 'peer access is not supported between these two devices'"),
            "error",
            "ncclUnhandledCudaError: Cuda failure 217 'peer access is not supported between these two devices'",
        ),
        (VERSION.format(*INTERNAL, "Proxy Call to rank 3 failed"), "error", "ncclInternalError: Proxy Call to"),
        (
            "NCCL communicator was aborted on rank 2.  Original reason for failure was: unhandled cuda error",
            "error",
            "unhandled cuda error",
        ),
        (
            "NCCL communicator was aborted on rank 2.  Original reason for failure was: " + TIMEOUT.format(2),
            "hang",
            "hang: NCCL's ALLREDUCE (number 59958 of its group) did not end within 1800 s on rank 2 on ",
        ),
        (TIMEOUT.format(2), "hang", "ALLREDUCE (number 59958 of its group) did not end within 1800 s on rank 2 on "),
    ],
)  # fmt: skip
def test_an_exception_of_nccl(tmp_path: Path, error: str, kind: str, told: str) -> None:
    class DistBackendError(RuntimeError):
        """As torch.distributed's."""

    exception = DistBackendError(error)
    assert is_consequence(exception) == (kind == "peer")
    write_heartbeat(tmp_path, Heartbeat(2, "n1", 1, 1.0, 7, "training"))
    record_failure(tmp_path, 2, 7, exception)
    first = first_failure(tmp_path)
    assert first is not None
    assert first.kind == kind
    cause = explain_end(tmp_path, 1).cause
    assert told in cause
    assert cause.endswith("; every rank lost a connection, as where the network fails") == (kind == "peer")
