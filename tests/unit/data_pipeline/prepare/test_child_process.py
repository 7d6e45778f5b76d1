"""Work that Ctrl-C can end although it is deaf to signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.child_process import call_in_child


def fail(text: str) -> None:
    raise UsageError(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_and_errors_come_back() -> None:
    waited: list[float] = []
    assert call_in_child(waited.append, divmod, 17, 5) == (3, 2)
    with pytest.raises(UsageError, match="this way"):
        call_in_child(waited.append, fail, "this way")
    with pytest.raises(UsageError, match="the process of die was killed"):
        call_in_child(waited.append, die)
    call_in_child(waited.append, time.sleep, 1.2)
    assert waited and max(waited) > 0.5


DEAF = """
    import os, signal, sys, time
    from biroute.data_pipeline.prepare.child_process import call_in_child

    def deaf(path):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        time.sleep(600)

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            call_in_child(lambda seconds: None, deaf, sys.argv[1])
        except KeyboardInterrupt:
            sys.exit(130)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_deaf_child_ends_with_its_parent(tmp_path, number: signal.Signals, status: int) -> None:  # type: ignore[no-untyped-def]
    script, said = tmp_path / "deaf.py", tmp_path / "pid"
    script.write_text(textwrap.dedent(DEAF))
    process = subprocess.Popen([sys.executable, str(script), str(said)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (said.exists() and said.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(said.read_text())
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(timeout=30) == status
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child outlives its parent")
