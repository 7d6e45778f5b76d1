"""The progress line on a real pseudo-terminal, in a file, and on a terminal or pipe that goes away."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from biroute.launcher.track.progress_line import ProgressLine, duration, with_prefix

METRICS = {
    "train/loss": 3.14159,
    "optim/learning_rate": 3e-4,
    "throughput/tokens_per_second": 12_345.0,
    "throughput/tflops_per_rank": 0.0512,
    "memory/peak_gib": 1.0,
}

TRAIN = """
import sys, time
from biroute.launcher.track.progress_line import ProgressLine
line = ProgressLine(100, log_every=10)
for step in range(1, 101):
    line.update(step, {"train/loss": 3.14159, "optim/learning_rate": 3e-4,
                       "throughput/tokens_per_second": 12_345.0, "throughput/tflops_per_rank": 0.0512})
    if step == 50:
        line.message("step 50: held-out loss 3.2000, 1.7000 bits per byte")
        print("a line from somewhere else")
        line.message("step 50: [saved] checkpoint")
        try:
            sys.stdin.readline()
        except OSError:  # the terminal that went away is our standard input, too
            pass
    time.sleep(0.004)
line.close()
line.update(1000, {})
line.message("and one after it")
open(sys.argv[1], "w").write("trained to the end")
"""


def screen_of(output: str) -> list[str]:
    """What a terminal shows after `output`: the control sequences that a live line is made of, carried out."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token.endswith("K"):
                rows[row] = ""
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return [text.rstrip() for text in rows if text.strip()]


def run_on_terminal(columns: int, done: Path, *, hang_up: bool = False) -> tuple[str, int]:
    """Run TRAIN on a pseudo-terminal; its output and exit status. `hang_up`: the terminal goes at step 50."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(done)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    output = b""
    while b"checkpoint" not in output:
        output += os.read(master, 65_536)
    if hang_up:
        os.close(master)
        return output.decode(), child.wait(60)
    os.write(master, b"go\n")
    while True:
        try:
            more = os.read(master, 65_536)
        except OSError:  # EIO: the child has ended
            break
        output += more
    os.close(master)
    return output.decode(), child.wait(60)


def test_terminal_shows_one_live_line_below_the_messages(tmp_path: Path) -> None:
    output, status = run_on_terminal(140, tmp_path / "done")
    assert status == 0
    screen = screen_of(output)
    assert screen[:3] == [
        "step 50: held-out loss 3.2000, 1.7000 bits per byte",
        "a line from somewhere else",
        "step 50: [saved] checkpoint",
    ]
    assert len(screen) == 5
    assert screen[4] == "and one after it"
    expected = "step 100/100  loss 3.1416  lr 3.00e-04  12.3k tokens/s  0.0512 TFLOP/s per rank  0:00 left"
    assert screen[3].endswith(expected)
    assert screen[3].startswith("━━━━━━━━")
    assert output.count("step ") > 5  # it moved


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "step 100/100  loss 3.1416  lr 3.00e-04  12.3k tokens/s  0:00 left"),
        (60, "step 100/100  loss 3.1416  12.3k tokens/s  0:00 left"),
        (40, "step 100/100  loss 3.1416  0:00 left"),
        (16, "step 100/100  0…"),
    ],
)
def test_a_narrow_terminal_shows_what_is_wanted_most(tmp_path: Path, columns: int, line: str) -> None:
    """And never wraps: the upper half of a wrapped line would stay at every redraw."""
    output, status = run_on_terminal(columns, tmp_path / "done")
    assert status == 0
    (live,) = [row for row in screen_of(output) if "100/100" in row]
    assert live.endswith(line) and len(live) <= columns


def test_terminal_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    _, status = run_on_terminal(140, tmp_path / "done", hang_up=True)
    assert status == 0
    assert (tmp_path / "done").read_text() == "trained to the end"


def test_pipe_without_reader_does_not_end_the_training(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "done")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().startswith(b"step  10/100  loss 3.1416")
    child.stdout.close()
    child.stdout = None
    _, errors = child.communicate(b"go\n", timeout=60)
    assert errors == b""
    assert child.returncode == 0  # 120, if Python could not flush its standard output at exit
    assert (tmp_path / "done").read_text() == "trained to the end"


def test_plain_lines_come_every_log_interval_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        line = ProgressLine(25, log_every=10, stream=stream)
        for step in range(1, 26):
            line.update(step, METRICS if step % 10 == 0 else {})
            if step == 20:
                line.message("saved [20]")
        line.close()
        line.update(25, METRICS)
        line.message("MLflow got all of it")
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = "  loss 3.1416  lr 3.00e-04  12.3k tokens/s  0.0512 TFLOP/s per rank  0:00 left"
    assert lines == [
        f"step 10/25{begin}",
        f"step 20/25{begin}",
        "saved [20]",
        f"step 25/25{begin}",
        "MLflow got all of it",
    ]


def test_odd_metrics_and_a_closed_stream_raise_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    stream = path.open("w")
    line = ProgressLine(3, stream=stream)
    line.update(1, {"train/loss": float("nan")})
    line.update(2, {"train/loss": "no number"})  # type: ignore[dict-item]
    line.update(3, {"train/loss": 1.0})
    stream.close()
    line.update(3, {"train/loss": 2.0})
    line.message("nobody reads this")
    line.close()
    assert [text.split("  ")[:2] for text in path.read_text().splitlines()] == [
        ["step 1/3", "loss nan"],
        ["step 3/3", "loss 1.0000"],
    ]


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("biroute.launcher.track.progress_line.time.monotonic", lambda: next(clock))
    with (tmp_path / "log").open("w") as stream:
        line = ProgressLine(50, stream=stream)
        line.update(21, {})  # resumed at step 20
        assert line.seconds_left() is None
        line.update(22, {})
        line.update(25, {})
    assert line.seconds_left() == 25 * 4.0 / 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (7445, "2:04:05"), (3 * 86400 + 7440, "3d 02:04")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (1234, "1.23k"), (12_345, "12.3k"), (4.56e6, "4.56M"), (2e11, "200G")]
)
def test_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert with_prefix(value) == text
