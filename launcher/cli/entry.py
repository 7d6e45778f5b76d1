"""Where `biroute` begins. It imports nothing that takes a moment, so that Ctrl-C is one line from here on.

What comes before is out of reach: the start of Python itself, and what the .pth files of the environment import, such
as the finder of an editable installation. Ctrl-C within these hundredths of a second still shows Python's own words.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from biroute.configs.errors import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line."""
    early = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else a shell wants it to be ignored
    if early:
        # No exception: one that is raised within an import shows that import's traceback, or is swallowed there.
        signal.signal(signal.SIGINT, _end)
    from biroute.launcher.cli.main import main as run

    try:
        if early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # before or after a command, which says itself what it keeps
        _say_stopped()
        sys.exit(EXIT_INTERRUPTED)


def _end(number: int, frame: FrameType | None) -> None:
    _say_stopped()
    os._exit(EXIT_INTERRUPTED)  # nothing is open yet


def _say_stopped() -> None:
    try:
        os.write(2, b"stopped\n")
    except OSError:  # nobody reads it any more
        return


if __name__ == "__main__":
    main()
