"""Ctrl-C, and the other ways in which a run is asked to end: taken at once, or held back until a step is whole."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DONE = b"\0"
SHOW_CURSOR = "\033[?25h\n"
"""A progress bar had hidden it."""
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""A cluster's or a container's way to end a job, and a terminal's that is closed."""


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
def answered(say: Callable[[str], None]) -> Iterator[None]:
    """Inside the block a Ctrl-C is answered at once, however long the main thread is in a kernel, and a second one leaves.

    ``say`` is called from another thread. What is written is written as a whole or not at all, so that nothing is lost by leaving
    but what came after the last checkpoint.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def answer() -> None:
        asked = 0
        while (numbers := reading.recv(1)) and numbers != DONE:
            if numbers[0] != signal.SIGINT:
                continue
            asked += 1
            if asked > 1:
                print("left", file=sys.stderr, end=SHOW_CURSOR if sys.stderr.isatty() else "\n", flush=True)
                os._exit(130)
            say("finishing this step, then saving; Ctrl-C again leaves without")

    thread = threading.Thread(target=answer, name="Ctrl-C", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.send(DONE)
        thread.join()
        reading.close()
        writing.close()


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
        handler = signal.getsignal(held_back[0])  # the one from before
        if callable(handler):  # not by the signal again, which ``answered`` would take for a second Ctrl-C
            handler(held_back[0], None)
        else:
            signal.raise_signal(held_back[0])
