"""What ranks agree on. They are threads here; two processes train in tests/student_train/test_ranks.py."""

import socket
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from rob.common import ranks
from rob.common.errors import FailureError, MisuseError
from rob.common.ranks import ALONE, Ranks, by_itself, current_ranks, from_main, once_a_machine
from support.rank_threads import World, ended_by


def test_rank_0_alone_looks_and_all_know(monkeypatch):
    world, looked = World(monkeypatch, 3), []
    assert world.run(lambda rank: from_main(lambda: looked.append(rank) or "seen")) == ["seen"] * 3
    assert looked == [0]

    def refuse():
        raise MisuseError("taken")

    found = world.run(lambda rank: ended_by(lambda: from_main(refuse), MisuseError))
    assert [str(error) for error in found] == ["taken"] * 3
    assert from_main(lambda: "alone") == "alone"


def test_a_rank_whose_others_never_come_ends_in_a_sentence(monkeypatch):
    """As where another one has not found its data, and no torchrun ends the rest."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "COMING", timedelta(seconds=1))
    with pytest.raises(
        FailureError, match=r"not all 2 ranks have come within .* minutes .*: look at what the others said"
    ):
        ranks.join_ranks()
    assert current_ranks() is ALONE


def test_one_rank_a_machine_compiles_before_the_others(monkeypatch):
    """Of four ranks on two machines."""
    world, said = World(monkeypatch, 4), []
    local = {0: "0", 1: "1", 2: "0", 3: "1"}
    monkeypatch.setattr(ranks, "os", SimpleNamespace(environ=SimpleNamespace(get=lambda *_: local[world.here.rank])))
    monkeypatch.setattr(ranks, "by_itself", nullcontext)  # it is for a whole process

    def work(rank):
        once_a_machine(lambda: said.append(("compiles", rank)))
        said.append(("goes on", rank))

    world.run(work)
    assert sorted(said[:2]) == [("compiles", 0), ("compiles", 2)]
    assert sorted(said[2:]) == [("goes on", rank) for rank in range(4)]
    once_a_machine(lambda: pytest.fail("alone there is nobody to wait"))


def test_a_rank_by_itself_is_alone(monkeypatch):
    World(monkeypatch, 2).run(lambda rank: None)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    assert current_ranks() == Ranks(1, 2)
    with by_itself():
        assert current_ranks() == ALONE
        assert torch.equal(ranks.joined(torch.ones(2)), torch.ones(2))
    assert current_ranks() == Ranks(1, 2)


@pytest.mark.parametrize(
    ("seconds", "asked_after", "stops_after"), [(0.0, 14, 22), (0.5, 14, 18), (5.0, 14, 14), (0.0, 98, 100)]
)
def test_a_signal_stops_all_ranks_after_the_same_step(monkeypatch, seconds, asked_after, stops_after):
    """One of them gets it. They ask every ten steps, or in two seconds, and stop when the next step is done: at the end
    of an epoch of a hundred at the latest."""
    world, clock, questions = World(monkeypatch, 2), [0.0, 0.0], [0, 0]
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: clock[world.here.rank])
    held = [[], []]

    @contextmanager
    def uninterrupted():
        yield held[world.here.rank]

    @contextmanager
    def ended_when_deaf(*_):
        yield

    monkeypatch.setattr(ranks, "uninterrupted", uninterrupted)
    monkeypatch.setattr(ranks, "ended_when_deaf", ended_when_deaf)
    reduced = ranks.dist.all_reduce

    def counted(*given, **options):
        questions[world.here.rank] += 1
        return reduced(*given, **options)

    monkeypatch.setattr(ranks.dist, "all_reduce", counted)

    def train(rank):
        done = 0

        def epoch():
            nonlocal done
            with ranks.whole_steps(Ranks(rank, 2)) as step:
                for _ in range(100):
                    with step():
                        done += 1
                        clock[rank] += seconds
                        if rank == 1 and done == asked_after:
                            held[1].append(2)

        assert isinstance(ended_by(epoch, KeyboardInterrupt), KeyboardInterrupt)
        return done

    assert world.run(train) == [stops_after] * 2
    assert max(questions) <= 2 + stops_after / max(1, min(10, 2 / max(seconds, 0.1)))
