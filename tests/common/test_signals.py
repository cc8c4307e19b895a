"""Ctrl-C is answered at once, and a second one leaves."""

import signal
import subprocess
import sys
from time import sleep

from rob.common.signals import uninterrupted

SCRIPT = """
import signal, time
from rob.common.signals import answered, uninterrupted
from contextlib import suppress
with suppress(KeyboardInterrupt), answered(lambda text: print(text, flush=True), 0.2):
    with uninterrupted() as held:  # a step
        print("begun", flush=True)
        time.sleep(3600) if {long} else time.sleep(1)
print("ended", flush=True)
"""


def start(long: bool) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SCRIPT.format(long=long)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_ctrl_c_is_answered_within_a_step_that_then_ends_as_a_whole():
    with start(long=False) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("finishing this step, then saving")
        assert process.stdout.readline() == "ended\n"
    assert process.returncode == 0


def test_a_second_one_leaves():
    with start(long=True) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("finishing this step, then saving")
        sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_a_signal_that_nohup_ignores_is_not_held_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with uninterrupted() as held:
            signal.raise_signal(signal.SIGHUP)
        assert not held
    finally:
        signal.signal(signal.SIGHUP, before)
