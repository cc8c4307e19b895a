"""Ctrl-C, and the other ways in which a run is asked to end: taken at once, or held back until a step is whole."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""A cluster's or a container's way to end a job, and a terminal's that is closed."""


PARENT = "ROB_PARENT"
"""In the environment: the process that a command was started by, and is to end with."""
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Where ``PARENT`` is set, have Linux send SIGTERM when that process dies, however it does; at once if it is dead."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the block each of ``ENDINGS`` is a Ctrl-C; the process then exits with 128 and the signal's number. One that is
    ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    process, received = os.getpid(), []

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked worker has nothing to save
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    handled = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    except KeyboardInterrupt:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Holds Ctrl-C and ``ENDINGS`` back until the end of the block, so that what is inside happens wholly or not at all.

    Yields the signals held back so far; a KeyboardInterrupt that the block raises for them becomes the first of them.
    """
    held_back: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield held_back
        return
    before = {
        number: signal.signal(number, lambda number, _: held_back.append(number))
        for number in (signal.SIGINT, *ENDINGS)
    }
    try:
        yield held_back
    except KeyboardInterrupt:
        if not held_back:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held_back:
        signal.raise_signal(held_back[0])
