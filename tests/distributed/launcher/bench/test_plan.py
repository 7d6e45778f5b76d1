"""`biroute bench plan` on two real processes: bytes as predicted, memory near it, and a time."""

from __future__ import annotations

from biroute.launcher.bench.plan.cases import PER_REGION, Case
from biroute.launcher.bench.plan.measure import measure
from biroute.launcher.bench.plan.page import memory_table, predicted_bytes, sent_by_axis, time_errors
from biroute.launcher.plan.memory import peak_memory

CASE = Case(
    "of a test", 2, {"hidden_size": 128, "num_layers": 2, "sequence_length": 512}, PER_REGION,
    {"tensor": 2, "sequence_parallel": True},
)  # fmt: skip


def test_a_case_is_counted_and_timed() -> None:
    counted, timed = measure(CASE, 0.0), measure(CASE, 0.05)
    for rank in range(2):
        sent = sent_by_axis(CASE, counted, rank)
        assert sent == predicted_bytes(CASE, rank)
        assert sent["tensor"] > 1e6
    memory, _ = peak_memory(CASE.work(), 0.4)
    assert max(one["peak_bytes"] for one in counted) < 2 * memory.total
    assert min(one["peak_bytes"] for one in counted) > 0.5 * memory.total
    assert all(one["median_seconds"] > 0 and one["phases"]["forward"] > 0 for one in timed)
    assert memory_table({"cases": {}})[1] == []
    assert time_errors({"cases": {}}) == {}
