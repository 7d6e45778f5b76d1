"""One rank, started by the local launcher or srun: `python -m biroute.launcher.start.worker CONFIG [overrides]`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from biroute.configs.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE_ERROR,
    DivergedError,
    FencedError,
    StoppedError,
    UsageError,
)
from biroute.configs.messages import printable
from biroute.configs.process import open_standard_streams, signal_when_parent_dies
from biroute.launcher.ranks.stop_signal import StopRequest
from biroute.launcher.start.library_warnings import LibraryWarnings


def exit_status_of(
    action: Callable[[], None],
    failed: Callable[[Exception], None] = lambda error: None,
    show: Callable[[Exception], None] = traceback.print_exception,
) -> int:
    """Run `action` and return its exit status; a usage error prints one line.

    `failed` is called with any error other than StoppedError and FencedError, `show` with an internal one.
    """
    try:
        action()
    except StoppedError as error:
        print(printable(str(error)), file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except FencedError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    except DivergedError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        failed(error)
        return EXIT_FAILURE
    except UsageError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        failed(error)
        return EXIT_USAGE_ERROR
    except Exception as error:
        show(error)
        failed(error)
        return EXIT_FAILURE
    return EXIT_OK


def train_rank(config_path: str, overrides: list[str]) -> int:
    """Train as one of the ranks that the environment describes; returns the exit status."""
    library_warnings = LibraryWarnings()
    stop = StopRequest()  # before the slow imports: a signal during them must not kill the rank
    from biroute.launcher.start.rank import Rank

    rank = Rank(stop, library_warnings)
    status = exit_status_of(lambda: rank.train(config_path, overrides), rank.watchdog.failed, rank.show)
    rank.close(status)
    return status


def main() -> None:
    open_standard_streams()
    # If the launcher is killed, the ranks save and stop rather than continue unsupervised.
    signal_when_parent_dies(signal.SIGTERM)
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(
            "error: no configuration; use: python -m biroute.launcher.start.worker CONFIG [section.field=value ...]",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE_ERROR)
    status = train_rank(sys.argv[1], sys.argv[2:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk that it goes to is full, which is no failure of training
            stream.flush()
    # Skip the teardown of gloo and of DeepSpeed's hooks: everything is on disk, and a hung thread must not keep
    # the rank alive.
    os._exit(status)


if __name__ == "__main__":
    main()
