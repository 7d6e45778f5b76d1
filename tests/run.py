"""Run all tests as three pytest processes side by side: `make test`.

The tests on a Slurm cluster mostly wait for its daemons, and those through the command line for processes to start,
while those of distributed ranks compute. Arguments are passed on to all of them, `-k name` say.

What failed is told once more at the very end, after the lines of all parts: of a long log, many read no more.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# Name -> the folders that pytest runs, and those in them that it leaves to another part.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "slurm": (["system/slurm", "unit"], []),  # which waits first and computes in one process then
    "system": (["system"], ["system/slurm"]),
    "ranks": (["distributed"], []),
}
NOTHING_COLLECTED = 5  # pytest's exit status where `-k` leaves no test of a part
ERROR_LINES = 12  # of each failed part, at the end


def start(name: str, arguments: list[str], told: list[str]) -> tuple[subprocess.Popen[str], threading.Thread]:
    """Start pytest on a part; a thread prints its lines behind its name, and adds what failed and why to `told`."""
    folders, left_out = PARTS[name]
    paths = [str(TESTS / folder) for folder in folders] + [f"--ignore={TESTS / folder}" for folder in left_out]
    command = [sys.executable, "-m", "pytest", "--durations=15", *paths, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(f"{name:6} | {line}")
            sys.stdout.flush()
            if line.startswith(("FAILED ", "ERROR", "INTERNALERROR", "E  ")):
                told.append(f"{name:6} | {line}")

    thread = threading.Thread(target=show)
    thread.start()
    return process, thread


def main() -> int:
    began = time.monotonic()
    told: dict[str, list[str]] = {name: [] for name in PARTS}
    running = {name: start(name, sys.argv[1:], told[name]) for name in PARTS}
    statuses = {}
    for name, (process, thread) in running.items():
        statuses[name] = process.wait()
        thread.join()
    seconds = time.monotonic() - began
    failed = [name for name, status in statuses.items() if status not in (0, NOTHING_COLLECTED)]
    if all(status == NOTHING_COLLECTED for status in statuses.values()):
        failed = list(statuses)
    for name in failed:
        sys.stdout.writelines(told[name][-ERROR_LINES:])  # pytest's own summary comes last
    verdict = f"failed: {', '.join(failed)}" if failed else "all tests passed"
    sys.stdout.write(f"{verdict}, {seconds:.0f} s\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
