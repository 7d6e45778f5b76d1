"""`biroute chat` on a terminal, and through a pipe."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: object) -> None:
        self._end, inner = pty.openpty()
        program = [sys.executable, "-m", "biroute.launcher.cli.main", *map(str, words)]
        self.process = subprocess.Popen(program, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
                                        preexec_fn=lambda: take_terminal(inner))  # fmt: skip
        os.close(inner)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait_for(self, true: Callable[[str], bool], seconds: float = 120.0, again: str = "") -> None:
        """Read until `true` of all that was shown; `again` is typed once more after each silent second."""
        deadline, heard = time.monotonic() + seconds, time.monotonic()
        while not true(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._end], [], [], 0.2)[0]:
                self.shown += os.read(self._end, 65536).decode(errors="replace")
                heard = time.monotonic()
            elif again and time.monotonic() - heard > 1.0:
                self.type(again)
                heard = time.monotonic()

    def interrupt(self, true: Callable[[str], bool]) -> None:
        """Type Ctrl-C until `true`: readline overlooks one that comes just before it begins to wait for a key."""
        self.type("\x03")
        self.wait_for(true, again="\x03")


def take_terminal(end: int) -> None:
    """Make a terminal that of this process, so that Ctrl-C on it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(end, termios.TIOCSCTTY, 0)


def test_keys_on_a_terminal(trained: Path) -> None:
    terminal = Terminal("chat", trained, "--max-tokens", 20, "--temperature", 0)
    try:
        terminal.wait_for(lambda shown: shown.endswith("> "))
        terminal.type("dropped")
        terminal.wait_for(lambda shown: shown.endswith("dropped"))
        terminal.interrupt(lambda shown: shown.endswith("\n> "))
        terminal.type("/what\r")
        terminal.wait_for(lambda shown: "/what is no command; /help lists them" in shown and shown.endswith("> "))
        before = terminal.shown.count("/what is no command")
        terminal.type("\x1b[A\r")  # the line before, from the history
        terminal.wait_for(lambda shown: shown.count("/what is no command") == before + 1 and shown.endswith("> "))
        terminal.type("hello\r")
        terminal.wait_for(lambda shown: "> hello\r\n" in shown)  # a Ctrl-C before that would drop the line
        terminal.interrupt(lambda shown: shown.partition("> hello\r\n")[2].endswith("\n> "))
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()


def test_through_a_pipe(trained: Path) -> None:
    program = [sys.executable, "-m", "biroute.launcher.cli.main", "chat", str(trained), "--max-tokens", "10"]
    text = "床前\n\x1b]0;x\n/routes\n/nothing\n".encode() + b"\xff\n" + b"/help\n"
    done = subprocess.run(program, input=text, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert b"/reset   forget" in done.stdout and b"> " not in done.stdout and b"\x1b" not in done.stdout
    assert b"/nothing is no command" in done.stderr and b"Traceback" not in done.stderr
