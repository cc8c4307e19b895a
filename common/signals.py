"""Ctrl-C, and the other ways in which a run is asked to end: taken at once, or held back until a step is whole."""

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DONE = b"\0"
SHOW_CURSOR = "\033[?25h\n"
"""A progress bar had hidden it."""
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
def interrupted_once() -> Iterator[None]:
    """Inside the block the first Ctrl-C or one of ``ENDINGS`` is taken as ever, and what follows is ignored: whoever presses
    Ctrl-C six times wants the run to end, and what it has to be saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGINT, *ENDINGS) if callable(signal.getsignal(n))]
    before: dict[int, Any] = {}
    asked: list[int] = []

    def once(number: int, frame: Any) -> None:
        if not asked:
            asked.append(number)
            before[number](number, frame)

    before.update({number: signal.signal(number, once) for number in numbers})
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_when_deaf(told: str, seconds: float, again_after: float = 2.0) -> Iterator[None]:
    """Inside the block a process that waits in C code, where no handler of Python's runs, still ends: ``seconds`` after the first
    of ``SIGINT`` and ``ENDINGS``, or at the second, if that comes ``again_after`` seconds later or more (torchrun repeats what a
    terminal sends to all). It then says ``told``, saves nothing, and exits with 128 and the signal's number.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)  # C writes there whatever the main thread does

    def watch() -> None:
        first, began = 0, 0.0
        while True:
            left = None if not first else max(0.0, began + seconds - time.monotonic())
            ready, _, _ = select.select([reads], [], [], left)
            received = os.read(reads, 1) if ready else b""
            if ready and received in (b"", b"\0"):
                return  # the block has ended
            if not ready or (
                first and time.monotonic() - began >= again_after and received[0] in (signal.SIGINT, *ENDINGS)
            ):
                os.write(2, f"error: {told}\n".encode())
                os._exit(128 + first)
            if not first and received[0] in (signal.SIGINT, *ENDINGS):
                first, began = received[0], time.monotonic()

    watching = threading.Thread(target=watch, name="signals", daemon=True)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writes, b"\0")
        watching.join()
        os.close(reads)
        os.close(writes)


@contextmanager
def answered(say: Callable[[str], None], again_after: float = 2.0) -> Iterator[None]:
    """Inside the block a Ctrl-C is answered at once, however long the main thread is in a kernel. One that comes ``again_after``
    seconds later or more exits without saving; one before that changes nothing.

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
        asked = 0.0
        while (numbers := reading.recv(1)) and numbers != DONE:
            if numbers[0] != signal.SIGINT:
                continue
            if asked and time.monotonic() - asked >= again_after:
                print(
                    "aborted without saving",
                    file=sys.stderr,
                    end=SHOW_CURSOR if sys.stderr.isatty() else "\n",
                    flush=True,
                )
                os._exit(130)
            if not asked:
                say("finishing this step, then saving; Ctrl-C again, in two seconds or more, leaves without")
                asked = time.monotonic()

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
    Any that is ignored (nohup) stays so.

    Yields the signals held back so far; a KeyboardInterrupt that the block raises for them becomes the first of them.
    """
    held_back: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield held_back
        return
    numbers = [number for number in (signal.SIGINT, *ENDINGS) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: held_back.append(number)) for number in numbers}
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
