"""Threads by the cores that this process has, and not by those of the machine."""

import os

import pytest

from rob.common import cores
from rob.common.views.config import LoaderConfig


@pytest.fixture
def eight_cores(monkeypatch, tmp_path):
    """Of which no cgroup takes any; gives the folder that stands for /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    return tmp_path


def in_cgroup(root, own: str, **files: str) -> None:
    (root / "own").write_text(own)
    for path, text in files.items():
        file = root / path.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_ranks_of_a_machine_share_its_cores(eight_cores, monkeypatch):
    assert LoaderConfig().threads == 8
    for ranks, share in ((2, 4), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert LoaderConfig().threads == share
        assert LoaderConfig(workers=5).threads == 5  # asked for by name


def test_a_quota_counts_wherever_it_stands(eight_cores, monkeypatch):
    in_cgroup(eight_cores, "0::/a/b\n", a__b__cpu_DOT_max="max 100000\n", a__cpu_DOT_max="350000 100000\n")
    assert cores.usable_cores() == 4  # 3.5: a started core is one
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores.usable_cores() == 2
    in_cgroup(eight_cores, "0::/a/b\n", a__b__cpu_DOT_max="50000 100000\n")
    assert cores.usable_cores() == 1


def test_a_quota_of_version_1(eight_cores):
    names = {
        "cpu,cpuacct__job__cpu_DOT_cfs_quota_us": "200000\n",
        "cpu,cpuacct__job__cpu_DOT_cfs_period_us": "100000\n",
    }
    in_cgroup(eight_cores, "9:memory:/job\n3:cpu,cpuacct:/job\n", **names)
    assert cores.usable_cores() == 2
    in_cgroup(eight_cores, "3:cpu,cpuacct:/job\n", **{"cpu,cpuacct__job__cpu_DOT_cfs_quota_us": "-1\n"})
    assert cores.usable_cores() == 8


def test_memory_is_that_of_the_strictest_cgroup(eight_cores, monkeypatch):
    machine = cores.usable_memory()
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    in_cgroup(eight_cores, "0::/a/b\n", a__b__memory_DOT_max="max\n", a__memory_DOT_max="6000\n")
    assert cores.usable_memory() == 6000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores.usable_memory() == 3000
    in_cgroup(eight_cores, "9:memory:/job\n3:cpu,cpuacct:/job\n", memory__job__memory_DOT_limit_in_bytes="5000\n")
    assert cores.usable_memory() == 2500
