"""Ranks that each have a network of their own, as machines have: namespaces of Linux, joined by a bridge in another one. Where
these may not be made, they share the loopback."""

import ctypes
import multiprocessing
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import support.ranks  # noqa: F401 (what the processes are forked with)

FORKED = multiprocessing.get_context("forkserver")
NEWNET = 0x40000000


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@contextmanager
def networks(ranks: int) -> Iterator[list[str] | list[None]]:
    """Names of so many namespaces; rank r has the address 10.77.0.(r + 1). None where making them needs root and ip(8)."""
    names = [f"rob{os.getpid()}-{rank}" for rank in range(ranks)]
    bridge = f"rob{os.getpid()}"
    made: list[str] = []
    found: list[str] | list[None] = names
    try:
        for name in (bridge, *names):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", bridge, "link", "set", "bridge", "up")
        for rank, name in enumerate(names):
            ip("-n", bridge, "link", "add", f"to{rank}", "type", "veth", "peer", "name", "net0", "netns", name)
            ip("-n", bridge, "link", "set", f"to{rank}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
    except (OSError, subprocess.CalledProcessError):
        found = [None] * ranks
    try:
        yield found
    finally:
        for name in made:
            ip("netns", "del", name)


def start_ranks(names: list[str] | list[None], function: Callable[[int, str], None], folder: Path) -> list[BaseProcess]:
    """``function(rank, str(folder))`` in each of the networks, with the environment that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        FORKED.Process(target=_there, args=(function, str(folder), name, port, rank, len(names)))
        for rank, name in enumerate(names)
    ]
    for process in processes:
        process.start()
    return processes


def _there(
    function: Callable[[int, str], None], folder: str, name: str | None, port: int, rank: int, ranks: int
) -> None:
    if name is not None:
        with open(f"/run/netns/{name}") as namespace:
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEWNET) == 0
    address, interface = ("127.0.0.1", "lo") if name is None else ("10.77.0.1", "net0")
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    at = {"MASTER_ADDR": address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": interface}
    os.environ.update({name: str(value) for name, value in {**of_torchrun, **at}.items()})
    torch.set_num_threads(1)
    function(rank, folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
