"""The kinds of failure that BiRoute reports on purpose."""

import errno

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE_ERROR = 2
EXIT_STOPPED = 75  # stopped on a signal with state saved: run me again (EX_TEMPFAIL of sysexits.h)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errno of a write that a disk, a quota or a limit refused


class UsageError(Exception):
    """Bad input: one line that names the field or file, its value and the remedy. Exit status 2."""


class StoppedError(Exception):
    """Training stopped on a signal after saving its state. Exit status 75."""


class FencedError(Exception):
    """Another attempt owns the run folder by now; this one has written nothing since and must end."""
