"""Devices, precisions, seeds, versions, ranks, and an interruption that waits."""

import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rob.common.errors import FailureError, MisuseError
from rob.common.ranks import ALONE, Ranks, join_ranks, lost_ranks_are_a_failure
from rob.common.run import autocast, free_memory, pick_device, seed_everything, versions
from rob.common.signals import ended_when_deaf, interrupted_once, stopped_by_signals, uninterrupted


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What is made the current device is noted."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return current


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    without_cuda(monkeypatch)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with_two_gpus(monkeypatch)
    assert pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there(monkeypatch):
    without_cuda(monkeypatch)
    with pytest.raises(MisuseError, match="`device` cuda: torch finds no CUDA device here; use `device` cpu"):
        pick_device("cuda")
    with_two_gpus(monkeypatch)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(MisuseError, match="this machine has 2 CUDA devices, numbered from 0"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_the_gpu_of_a_rank_becomes_the_current_one(monkeypatch, name, index):
    """Triton launches on the current device, wherever the tensors are."""
    current = with_two_gpus(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(name) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MisuseError, match="this machine has 2 CUDA devices"):
        pick_device("cuda")


def test_an_apple_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(MisuseError, match="no Apple GPU"):
        pick_device("mps")


@pytest.mark.parametrize(("name", "offer"), [("cud", "cuda"), ("cpus", "cpu"), ("cuda:x", "cuda"), ("xpu", "cpu")])
def test_an_unknown_device_is_answered_with_the_nearest(name, offer):
    """xpu is a device to torch, but none that rob was ever run on."""
    with pytest.raises(MisuseError, match=f"unknown device '{name}': did you mean .*{offer}"):
        pick_device(name)


def test_precisions():
    cpu = torch.device("cpu")
    rows = torch.ones(2, 2)
    with autocast(cpu, "fp32"):
        assert (rows @ rows).dtype == torch.float32
    with autocast(cpu, "bf16"):
        assert (rows @ rows).dtype == torch.bfloat16
    with pytest.raises(MisuseError, match="fp16 needs a GPU: on a CPU use fp32, or bf16"):
        autocast(cpu, "fp16")
    with pytest.raises(MisuseError, match="unknown precision 'fp8'"):
        autocast(cpu, "fp8")


def test_the_seed_reaches_every_generator():
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]

    seed_everything(3)
    first = draws()
    seed_everything(4)
    assert all(one != other for one, other in zip(draws(), first, strict=True))
    seed_everything(3)
    assert draws() == first
    seed_everything(2**40)  # NumPy alone takes 32 bits


def test_no_seed_is_kept_for_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("traceback.format_stack", lambda *_: pytest.fail("torch keeps the stack of every seed"))
    seed_everything(5)
    found = torch.rand(3)
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_versions_of_what_is_not_installed():
    found = versions("torch", "no-such-package")
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["no-such-package"] == "absent"
    assert found["python"].startswith("3.")


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_ranks() == ALONE
    assert ALONE.is_main
    assert not Ranks(1, 2).is_main


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert done == ["the rest of the block"]
    with pytest.raises(KeyboardInterrupt):  # and then it is as ever
        signal.raise_signal(signal.SIGINT)


def test_sigterm_is_a_ctrl_c_that_ends_with_143():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(SystemExit) as ended, stopped_by_signals():
        try:
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                done.append("the rest of the block")
        except KeyboardInterrupt:
            done.append("saved")
            raise
    assert ended.value.code == 143
    assert done == ["the rest of the block", "saved"]
    with pytest.raises(SystemExit) as ended, stopped_by_signals():
        signal.raise_signal(signal.SIGHUP)
    assert ended.value.code == 129
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_in_the_block_is_not_swallowed():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="first"), uninterrupted():
        raise ValueError("first")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_signals_to_hold_back():
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with uninterrupted():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_pressing_ctrl_c_six_times_ends_a_block_once():
    """What is saved on the way out is saved."""
    done = []
    with pytest.raises(KeyboardInterrupt), stopped_by_signals(), interrupted_once():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.raise_signal(number)
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("saved")
            raise
    assert done == ["saved"]
    with pytest.raises(KeyboardInterrupt):  # and then it is as ever
        signal.raise_signal(signal.SIGINT)


DEAF = """
import signal, sys, time
from rob.common.signals import ended_when_deaf, stopped_by_signals, uninterrupted

with stopped_by_signals(), uninterrupted(), ended_when_deaf("nobody answers", float(sys.argv[1]), again_after=0.3):
    print("deaf", flush=True)
    while True:  # the signals are held back for ever
        time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "signals"), [(1.0, 1), (60.0, 2)])
def test_a_process_that_waits_for_a_frozen_rank_can_be_ended(seconds, signals):
    """At the second signal, or some time after the first."""
    words = [sys.executable, "-c", DEAF, str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "deaf\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error == "error: nobody answers\n"


def test_a_block_that_hears_is_not_ended(tmp_path):
    with pytest.raises(KeyboardInterrupt), uninterrupted(), ended_when_deaf("", 0.2, 0.0):
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.5)  # and nothing ends this process


def test_a_lost_rank_is_a_failure_in_one_sentence(monkeypatch):
    told = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    sentence = r"rank 1 has lost another rank.*goes on from its last checkpoint"
    with pytest.raises(FailureError, match=sentence), lost_ranks_are_a_failure():
        raise RuntimeError(told)
    with pytest.raises(RuntimeError, match="size mismatch"), lost_ranks_are_a_failure():
        raise RuntimeError("size mismatch")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError, match="closed by peer"), lost_ranks_are_a_failure():
        raise RuntimeError(told)


def test_what_torch_has_cached_on_a_gpu_is_free(monkeypatch):
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 130
