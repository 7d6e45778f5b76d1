"""Run all tests as two pytest processes side by side: `make test`.

The tests through the command line mostly wait, for processes to start and for Slurm's daemons, while the others
compute. Arguments are passed on to both, `-k name` say.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PARTS = {"system": ["system"], "others": ["unit", "distributed"]}
NOTHING_COLLECTED = 5  # pytest's exit status where `-k` leaves no test of a part


def start(name: str, folders: list[str], arguments: list[str]) -> tuple[subprocess.Popen[str], threading.Thread]:
    """Start pytest on some folders; a thread prints its lines behind its name."""
    paths = (str(TESTS / folder) for folder in folders)
    command = [sys.executable, "-m", "pytest", "--durations=15", *paths, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(f"{name:6} | {line}")
            sys.stdout.flush()

    thread = threading.Thread(target=show)
    thread.start()
    return process, thread


def main() -> int:
    began = time.monotonic()
    running = {name: start(name, folders, sys.argv[1:]) for name, folders in PARTS.items()}
    statuses = {}
    for name, (process, thread) in running.items():
        statuses[name] = process.wait()
        thread.join()
    seconds = time.monotonic() - began
    failed = [name for name, status in statuses.items() if status not in (0, NOTHING_COLLECTED)]
    if all(status == NOTHING_COLLECTED for status in statuses.values()):
        failed = list(statuses)
    verdict = f"failed: {', '.join(failed)}" if failed else "all tests passed"
    sys.stdout.write(f"{verdict}, {seconds:.0f} s\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
