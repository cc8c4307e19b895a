"""How many threads load images."""

from rob.common.views.config import LoaderConfig


def test_the_ranks_of_a_machine_divide_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert LoaderConfig().threads == 8
    for ranks, threads in ((2, 4), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert (LoaderConfig().threads, LoaderConfig(workers=5).threads) == (threads, 5)
