"""Work in a child process, for what would otherwise be deaf to Ctrl-C, and child processes that end with this one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from biroute.configs.errors import UsageError
from biroute.configs.process import signal_when_parent_dies

_LOOK_SECONDS = 0.5

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def become_child() -> None:
    """Set up a child process: its parent handles Ctrl-C, and when the parent is killed, it ends as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_when_parent_dies(signal.SIGKILL)
    parent = parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before
        os._exit(1)


@contextmanager
def starting_children() -> Iterator[None]:
    """While this process starts children, hold Ctrl-C back: they inherit that, and so none dies with a traceback.

    Ctrl-C reaches a child while it imports, too, before `become_child`; here it takes effect when the block ends.
    """
    resource_tracker.ensure_running()  # multiprocessing starts it beside a first child, and then unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call_in_child(
    waiting: Callable[[float], None],
    function: Callable[_Arguments, _Result],
    /,
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    """Call a module's function in a child process, so that Ctrl-C ends it at once, and return its result.

    Args:
        waiting: called twice a second with the seconds since the start.
        function: what to call; its arguments, result and exceptions are pickled.
        arguments, named: its arguments.

    Raises:
        UsageError: the child was killed.
        Exception: what the function raises.
    """
    context = get_context("spawn")  # this process may have threads, and forking is not safe then
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, function, arguments, named), daemon=True)
    began = time.monotonic()
    try:
        with starting_children():
            child.start()
        theirs.close()
        while not ours.poll(_LOOK_SECONDS):
            waiting(time.monotonic() - began)
        good, value = ours.recv()
    except EOFError:
        raise UsageError(
            f"the process of {function.__name__} was killed, perhaps for lack of memory; give it more and run the "
            "same command again"
        ) from None
    finally:
        if child.pid is not None:
            child.kill()
            child.join()
    if not good:
        raise value
    result: _Result = value
    return result


def _serve(
    connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    become_child()
    try:
        answer = (True, function(*arguments, **named))
    except Exception as error:
        answer = (False, error)
    connection.send(answer)
