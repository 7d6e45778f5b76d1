"""What comes from outside is read with bounds and types, and is wrong in one way only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from biroute.configs import records
from biroute.configs.records import UnixSeconds, last_lines, parse_json, read_small, record_of

DEEP = "[" * 200_000


@dataclass(frozen=True)
class Thing:
    number: int
    when: UnixSeconds
    names: tuple[str, ...] = ()


@pytest.mark.parametrize("text", ["", "{", DEEP, '{"a": ' * 100_000, "nan?", "9" * 5000])
def test_json_is_json_or_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 of any message
        parse_json(text)


@pytest.mark.parametrize(
    "fields",
    [None, [], {"number": 1}, {"number": "x", "when": 1}, {"number": 1, "when": 1e400}, {"number": 1, "when": -1},
     {"number": 1, "when": 1, "names": 5}, {"number": 1, "when": 1, "names": [[]]}],
)  # fmt: skip
def test_a_record_has_its_types(fields: object) -> None:
    assert record_of(Thing, {"number": 1, "when": 2.5, "names": ["a"]}) == Thing(1, 2.5, ("a",))
    with pytest.raises(ValueError, match="Thing"):
        record_of(Thing, fields)


def test_a_file_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LARGEST_BYTES", 1 << 20)
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    assert len(read_small(path)) == 1 << 20
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="has more than 1 MiB"):
        read_small(path)


def test_the_end_of_a_log_however_large(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(300_000)))
    assert last_lines(path, 2) == ["line 299998", "line 299999"]
    path.write_bytes(b"one\n\xff two")
    assert last_lines(path, 5) == ["one", "\ufffd two"]


def test_a_strangers_run_folder_costs_no_traceback(tmp_path: Path) -> None:
    """Each file of a run folder that `biroute status` reads, with what json and types do not expect."""
    from biroute.launcher.attempts.failures import first_failure, read_heartbeats
    from biroute.launcher.attempts.run_files import log_dir
    from biroute.slurm.run_folder import RunFolder
    from biroute.slurm.status import status_of
    from biroute.slurm.status_text import format_status

    begin = {"attempt": 1, "event": "begin", "time": 1.0, "nodes": ["n1"]}
    lines = [DEEP, "5", json.dumps(begin | {"time": 1e300}), json.dumps(begin | {"nodes": [[]]}), json.dumps(begin)]
    end = {"attempt": 1, "event": "end", "time": 2.0, "status": 1, "cause": "it died"}
    lines += [json.dumps(end | {"step": []}), json.dumps(end | {"decision": "explode"}), json.dumps(end)]
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines))
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "jobs.jsonl").write_text(f'{DEEP}\n{{"job_id": "7"}}\n[]\n')
    point = '{"step": 1e400, "time_ms": 1, "metrics": {"train/loss": 1}}'
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP}\n{point}\n")
    logs = log_dir(tmp_path, 1)
    for folder in ("ranks", "failures"):
        (logs / folder).mkdir(parents=True)
        (logs / folder / "rank-00000.json").write_text(DEEP)
        (logs / folder / "rank-00001.json").write_text('{"rank": "x", "host": 5, "time": [], "step": null}')
    run = RunFolder(tmp_path)
    assert run.job_ids() == ["7"] and run.last_point() is None
    assert "it died" in format_status(status_of(run, []))
    assert first_failure(logs) is None and read_heartbeats(logs) == []
