"""Training on two ranks (gloo): every image once an epoch over both, the same weights on both, and targets of the right views."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rob.common.store.codec import decode
from rob.student_train.run_folder import read_log
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

SCRIPT = """
import sys
from pathlib import Path
import torch
import rob
from rob.student_train import train
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached, CachedTargets

data, store, out = map(Path, sys.argv[1:4])
seen = []

class Checking(CachedTargets):
    def make_target(self, arrays):
        seen[-1]["embedding"] = arrays["embedding"].clone()
        return super().make_target(arrays)

original = train.Trainer.step
def step(self, number, crops, target, pair_weights):
    trainers.append(self)
    health, rate = original(self, number, crops, target, pair_weights)
    seen[-1]["loss"] = health[0].clone()
    return health, rate
trainers, rehearsed = [], []
train.Trainer.step = step
seeded, seed_step = [], train.seed_step
def noted(*which):
    seeded.append(list(which))
    seed_step(*which)
train.seed_step = noted
class CompilingTrainer(train.Trainer):
    compiles = property(lambda self: True, lambda self, value: None)
    def rehearse(self, *arguments):
        rehearsed.append(arguments)
        super().rehearse(*arguments)
train.Trainer = CompilingTrainer
timed = train.timed
def recording(batches, stopwatch):
    for batch in timed(batches, stopwatch):
        seen.append({"ids": torch.from_numpy(batch.image_ids.copy())})
        yield batch
train.timed = recording

class Checked(Cached):
    def open(self, run: RunContext) -> Checking:
        return Checking(self, run)

config = rob.TrainConfig(
    data, out, rob.StudentConfig("test_resnet", 32, True), Checked(store),
    pairing=rob.PairingConfig("same", 1), optimiser=rob.OptimiserConfig(warmup_epochs=0.0), epochs=2,
    loader=rob.LoaderConfig(batch_size=8, workers=1), device="cpu",
)
train.train_student(config)
rank = torch.distributed.get_rank()
weights = {name: value.clone() for name, value in trainers[-1].model.backbone.named_parameters()}
found = {"seen": seen, "weights": weights, "rehearsed": len(rehearsed), "seeded": seeded}
torch.save(found, out.parent / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


RESUMED = """
import signal
import sys
from dataclasses import replace
from pathlib import Path
import rob
import torch
from rob.common import ranks
from rob.student_train import train

data, store, out = map(Path, sys.argv[1:4])
copies = []
class Kept(rob.WithCopy):
    def open(self, run):
        branch = super().open(run)
        copies.append(branch.moving)
        return branch
whole = rob.TrainConfig(
    data, out, rob.StudentConfig("test_resnet", 32, True, drop_path=0.5), Kept(rob.Cached(store), copy_momentum=0.9),
    rob.ObjectiveConfig("disco", hidden_dim=16, queue=16), pairing=rob.PairingConfig("same", 2),
    optimiser=rob.OptimiserConfig(warmup_epochs=0.0), epochs=2,
    loader=rob.LoaderConfig(batch_size=8, workers=1), device="cpu", log_every=1, accumulate=2,
)
train.train_student(whole)

original = train.Trainer.step
def step(self, number, *arguments):
    reached[:] = [number]
    return original(self, number, *arguments)
reached = []
train.Trainer.step = step
ranks.ASKED_EVERY = 1
timed = train.timed
def interrupted(batches, stopwatch):
    for batch in timed(batches, stopwatch):
        if reached == [4] and torch.distributed.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)  # on one rank alone, and not in a step
        yield batch
train.timed = interrupted
halves = replace(whole, out=out.with_name("halves"))
try:
    train.train_student(halves)
    raise AssertionError("not interrupted")
except KeyboardInterrupt:
    assert reached in ([5], [6])  # asked after step 5, and answered after the next one, or at once where they are slow
    torch.distributed.barrier()
train.Trainer.step, train.timed = original, timed
train.train_student(halves)
for copy in copies[:1] + copies[2:]:
    for parameter in copy.copy.parameters():
        lowest, highest = parameter.detach().clone(), parameter.detach().clone()
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        assert torch.equal(lowest, highest)
torch.distributed.destroy_process_group()
"""


def on_two_ranks(folder: Path, text: str, data: Path, store: Path) -> None:
    """Runs the script ``text`` with ``data``, ``store`` and ``folder / "run"`` as torchrun would, twice at once."""
    script = folder / "two_ranks.py"
    script.write_text(text)
    as_two_ranks(sys.executable, script, data, store, folder / "run")


def as_two_ranks(*words: object) -> list[str]:
    """What the command prints, run as torchrun would, twice at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            list(map(str, words)),
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed, errors = zip(*(process.communicate(timeout=240) for process in ranks), strict=True)
    assert [process.returncode for process in ranks] == [0, 0], errors
    return list(printed)


@pytest.mark.slow
def test_two_ranks_share_the_images_and_agree_on_the_weights(tmp_path: Path) -> None:
    data = tiny_beton(tmp_path, 32)
    whole = tiny_store(tmp_path / "targets.zarr", data, tiny_teacher_checkpoint(tmp_path))
    on_two_ranks(tmp_path, SCRIPT, data.path, whole.path)

    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [one["rehearsed"] for one in found] == [1, 0]  # by the first rank of the machine, once
    assert [one["seeded"] for one in found] == [[[0, rank, step] for step in range(8)] for rank in range(2)]
    for epoch in range(2):
        steps = [found[rank]["seen"][4 * epoch : 4 * epoch + 4] for rank in range(2)]
        ids = torch.cat([step["ids"] for rank in steps for step in rank])
        assert sorted(ids.tolist()) == list(range(32))
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name]), name

    rows = decode(whole.encoding, whole.read(0, 32))["embedding"]
    for rank in range(2):
        for number, step in enumerate(found[rank]["seen"]):
            column = (number // 4) % 2  # one target view an epoch, in turn
            assert torch.equal(step["embedding"][:, 0], rows[step["ids"], column])
    assert (tmp_path / "run" / "student.safetensors").exists()
    (line,) = read_log(tmp_path / "run")  # of both ranks' shares
    shares = torch.tensor([[step["loss"] for step in one["seen"]] for one in found])
    assert line["loss"] == pytest.approx(shares.mean().item(), rel=1e-5)
    assert (shares[0] != shares[1]).all()


@pytest.mark.slow
def test_two_ranks_resumed_are_two_ranks_uninterrupted(tmp_path: Path) -> None:
    """In the middle of an epoch, of a store's targets and a copy's, which is the same on both, by a student that sees a batch in
    two parts, and with drop path, which every rank draws for itself."""
    data = tiny_beton(tmp_path, 32)
    store = tiny_store(tmp_path / "targets.zarr", data, tiny_teacher_checkpoint(tmp_path)).path
    on_two_ranks(tmp_path, RESUMED, data.path, store)
    assert len((tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()) == 8
    for file in (tmp_path / "run").glob("student*.safetensors"):
        whole, halves = load_file(file), load_file(tmp_path / "halves" / file.name)
        for name, value in whole.items():
            assert torch.equal(value, halves[name]), name
    assert (tmp_path / "run" / "student_average.safetensors").exists()


@pytest.mark.slow
def test_the_first_rank_of_the_command_speaks_for_all(tmp_path: Path) -> None:
    data = tiny_beton(tmp_path, 32).path
    views = ("--targets", "momentum", "--objective", "moco", "--queue", 8, "--recipe", "moco-v2")
    student = ("--student", "test_resnet", "--image-size", 32, "--hidden-dim", 16, "--batch-size", 8, "--epochs", 1)
    command = (sys.executable, "-m", "rob", "train-student", data, "--out", tmp_path / "run", *views, *student)
    first, second = as_two_ranks(*command, "--workers", 1, "--loader", "torch")
    assert "student.safetensors: loss " in first
    assert "nan" not in first
    assert second == ""
