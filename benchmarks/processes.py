"""Runs, each a process of its own: some at a time, none begun after a time limit."""

import multiprocessing
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from time import monotonic
from typing import Any

import torch

PRELOADED = ["rob.benchmarks.claims_run"]
"""What takes long to import, once for all runs."""


def rob(*words: object) -> None:
    """A command, in a process of its own, as a user has it."""
    print("$ rob", *words, flush=True)
    subprocess.run([sys.executable, "-m", "rob", *map(str, words)], check=True)


def do_all(work: Callable[[Any], None], jobs: Sequence[Any], at_once: int, deadline: float | None) -> int:
    """``work`` on each of ``jobs`` in turn, ``at_once`` at a time, none begun after the ``deadline`` (of ``monotonic``); how many
    failed. ``work`` is a function of a module, or a partial of one.

    Processes are forked off a server that has imported everything and has not touched a GPU: they start in a moment.
    """
    if not jobs:
        return 0
    context = starting()
    waiting, running, failed = deque(jobs), {}, 0
    try:
        while waiting or running:
            if deadline is not None and monotonic() > deadline:
                waiting.clear()
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                process = context.Process(target=work, args=(job,))
                process.start()
                running[process.sentinel] = (process, job)
            for sentinel in connection.wait(list(running), timeout=1.0):
                process, job = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed += 1
                    print(f"failed: {job}", file=sys.stderr, flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
    return failed


def starting() -> Any:
    """How processes are started: from a server, or anew where what it imported has touched CUDA, which a fork then cannot use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    probe = context.Process(target=_refuse_bad_fork)
    probe.start()
    probe.join()
    return multiprocessing.get_context("spawn") if probe.exitcode else context


def _refuse_bad_fork() -> None:
    sys.exit(torch.cuda._is_in_bad_fork())
