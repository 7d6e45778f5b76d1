"""BiRoute's own exceptions and exit codes."""

import errno

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE_ERROR = 2
EXIT_INTERRUPTED = 130  # Ctrl-C where nothing but finished parts is kept (128 + SIGINT, as shells count)
EXIT_STOPPED = 75  # stopped on a signal with its state saved; the same command resumes (EX_TEMPFAIL of sysexits.h)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a write failed for lack of space, quota or file-size limit


class UsageError(Exception):
    """Bad input. The message is one line that names the field or file, its value and the remedy. Exit status 2."""


class StoppedError(Exception):
    """Training stopped on a signal after saving its state. Exit status 75."""


class DivergedError(Exception):
    """Training has diverged: gradients or weights are no longer finite. Exit status 1."""


class FencedError(Exception):
    """Another attempt has taken over the run folder; this one has written nothing since then and must end."""
