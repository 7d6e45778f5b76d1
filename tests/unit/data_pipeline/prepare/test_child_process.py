"""Work that Ctrl-C can end although it is deaf to signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from biroute.configs.data_section import TokenizerConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.child_process import call_in_child
from biroute.data_pipeline.prepare.encode import PartEncoder, Texts
from biroute.data_pipeline.prepare.tokenizer import train_tokenizer


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


STARTING = """
    import os, pathlib, time

    if __name__ == "__mp_main__":  # a child that imports the module of the function
        pathlib.Path(os.environ["STARTED"]).write_text(str(os.getpid()))
        time.sleep(1)

    from biroute.data_pipeline.prepare.child_process import call_in_child

    if __name__ == "__main__":
        call_in_child(lambda seconds: None, time.sleep, 0)
"""


def test_a_child_that_is_starting_leaves_ctrl_c_to_its_parent(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C reaches it as well, while it imports: it leaves that to its parent, and shows no traceback."""
    script, started = tmp_path / "starting.py", tmp_path / "started"
    script.write_text(textwrap.dedent(STARTING))
    process = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "STARTED": str(started)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(int(started.read_text()), signal.SIGINT)
    assert process.communicate(timeout=30) == (None, "")
    assert process.returncode == 0


def test_tokenising_that_is_interrupted_waits_for_no_part(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The workers are still starting when the interruption comes; a part that they had finished would be there."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(train_tokenizer(["some words to train on " * 200], TokenizerConfig(vocab_size=300)).model_bytes)
    parts = [tmp_path / f"part-{number}.npz" for number in range(4)]
    encoder = PartEncoder(model, "uint16", 2, lambda mark: None)
    encoder.__enter__()
    for number, path in enumerate(parts):
        encoder.submit(path, Texts(["some words"], [False]), number)
    encoder.__exit__(KeyboardInterrupt, None, None)
    assert not any(path.exists() for path in parts)
    assert not multiprocessing.active_children()
