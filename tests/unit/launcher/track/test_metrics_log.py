"""The metrics log: no value is lost or doubled by a kill, a full disk or a second attempt."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from biroute.launcher.track.metrics_log import MetricsLog, read_points, scan
from biroute.launcher.track.uploader import next_batch


def test_spool_keeps_every_value_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 0.1, "b": float("nan"), "c": float("inf"), "d": float("-inf"), "损失": 2.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    (point,) = read_points(path)
    assert point.step == 1
    assert str(point.metrics) == "{'a': 0.1, 'b': nan, 'c': inf, 'd': -inf, '损失': 2.0}"


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b"\x00" * 100_000, b"\xff\xfe", b'{"step": 3}'])
def test_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, {"a": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read_points(path)) == 1
    metrics_log = MetricsLog(path)
    assert path.read_bytes() == whole
    assert metrics_log.size_bytes == len(whole)
    metrics_log.append(2, {"a": 2.0})
    assert [point.step for point in read_points(path)] == [1, 2]


def test_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(1, {"a": 1.0})
    path.write_bytes(path.read_bytes()[:-1])
    metrics_log = MetricsLog(path)
    assert not metrics_log.append(1, {"a": 5.0})
    assert metrics_log.size_bytes == path.stat().st_size
    assert [point.metrics for point in read_points(path)] == [{"a": 1.0}]


def test_damaged_line_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "metrics": []}\n')
    MetricsLog(path).append(3, {"a": 3.0})
    assert [point.step for point in read_points(path)] == [1, 3]
    assert [end for _, end in scan(path)][-1] == path.stat().st_size


def test_repeated_step_keeps_its_first_value_and_takes_new_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(10, {"loss": 1.0})
    again = MetricsLog(path)
    assert not again.append(10, {"loss": 2.0})
    assert again.append(10, {"loss": 2.0, "heldout": 3.0})
    assert [point.metrics for point in read_points(path)] == [{"loss": 1.0}, {"heldout": 3.0}]


def test_full_disk_delays_points_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    metrics_log.append(1, {"a": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel writes the first ten bytes of the line and then refuses, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics_log.size_bytes + 10, hard))
    try:
        with pytest.raises(OSError, match="only 10 of"):
            metrics_log.append(2, {"a": 2.0})
        with pytest.raises(OSError, match="only 10 of"):
            metrics_log.append(3, {"a": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == metrics_log.size_bytes
    metrics_log.append(4, {"a": 4.0})
    assert [point.step for point in read_points(path)] == [1, 2, 3, 4]


def test_batches_cover_the_spool_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_log = MetricsLog(path)
    for step in range(700):
        metrics_log.append(step, {"a": 1.0, "b": 2.0, "c": 3.0})
    steps, end, batches = [], 0, 0
    while end < metrics_log.size_bytes:
        points, end = next_batch(path, end)
        assert 0 < sum(len(point.metrics) for point in points) <= 1000
        steps += [point.step for point in points]
        batches += 1
    assert steps == list(range(700))
    assert batches == 3
    assert next_batch(path, end) == ([], end)
