"""Four ranks with a network each are one rank; one that is killed ends the others, and any number of ranks goes on."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rob.common.errors import FailureError
from rob.common.images.beton import Beton
from rob.common.ranks import ALONE, Ranks
from rob.student_train import train
from rob.student_train.config import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train_config import TrainConfig
from support.namespaces import networks, start_ranks
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, log_of

RANKS, BATCH, EPOCHS = 4, 8, 2
CASES = ("embedding", "swav", "moco", "dino")
"""Of a store, the first two; then without a teacher, with a queue, a running centre, and a slow copy of the student."""


def config_of(name: str, folder: Path) -> TrainConfig:
    """A student without BatchNorm, of which each rank would see its own share."""
    cached, (data,) = CASES.index(name) < 2, folder.glob("*.beton")
    more = {"moco": {"queue": 16}, "dino": {"centre_targets": "running"}}.get(name, {})
    momentum = Momentum(prototypes=12 if name == "dino" else None, copy_momentum=0.9)
    return TrainConfig(
        data,
        folder / "ranks" / name,
        StudentConfig("test_vit", 32, True),
        Cached(folder / "targets.zarr") if cached else momentum,
        ObjectiveConfig(name, hidden_dim=16, bottleneck=8, head_norm=False, **more),
        PairingConfig("same", 1) if cached else PairingConfig("cross", 2, fresh=False),
        OptimiserConfig("sgd", lr=0.05, warmup_epochs=0),
        epochs=EPOCHS,
        loader=replace(LOADER, batch_size=BATCH),
        device="cpu",
        log_every=1,
    )


def train_all(rank: int, folder: str) -> None:
    for name in CASES:
        train.train_student(config_of(name, Path(folder)))


def train_until_killed(rank: int, folder: str) -> None:
    """The third rank dies in the middle of the second epoch; what the others then say goes into a file each."""
    step = train.Trainer.step

    def dying(self, number, *arguments):
        if rank == 2 and number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *arguments)

    train.Trainer.step = dying
    train.RunFolder.is_due = property(lambda self: self.ranks.is_main)  # checkpoints by the minute
    config = config_of("embedding", Path(folder))
    try:
        train.train_student(replace(config, out=Path(folder) / "killed"))
    except FailureError as error:
        (Path(folder) / f"said-{rank}").write_text(str(error))


def joint_order(config: TrainConfig, num_images: int, window_blocks: int, epoch: int, ranks: Ranks = ALONE):
    """Of one rank, whose batches are what four have together."""
    own = [order_of_rank(config, num_images, window_blocks, epoch, Ranks(rank, RANKS)) for rank in range(RANKS)]
    return np.stack(own).reshape(RANKS, -1, BATCH // RANKS).swapaxes(0, 1).ravel()


order_of_rank = train.epoch_order


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data: Beton = tiny_beton(tmp_path, 32)
    tiny_store(tmp_path / "targets.zarr", data, tiny_teacher_checkpoint(tmp_path, prototypes=12))
    with networks(RANKS) as names:
        processes = start_ranks(names, train_all, tmp_path)
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0] * RANKS

        processes = start_ranks(names, train_until_killed, tmp_path)
        for process in processes:
            process.join(120)
            process.kill()  # one that waits for ever
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1, 3)]
    assert all(f"rank {rank} has lost another rank" in text for rank, text in zip((0, 1, 3), said, strict=True))
    killed = replace(config_of("embedding", tmp_path), out=tmp_path / "killed")
    assert torch.load(killed.out / "checkpoint.pt", weights_only=True)["state"]["step"] in (5, 6)

    monkeypatch.setattr(train, "epoch_order", joint_order)
    train.train_student(killed)  # alone it goes on
    for name in CASES:
        ranks = config_of(name, tmp_path)
        train.train_student(replace(ranks, out=tmp_path / "one" / name))
    for name in (*CASES, "killed"):
        one = tmp_path / "one" / name.replace("killed", "embedding")
        other = tmp_path / "killed" if name == "killed" else tmp_path / "ranks" / name
        norms = [[line["gradient_norm"] for line in log_of(out)] for out in (one, other)]
        np.testing.assert_allclose(*norms, rtol=1e-3, err_msg=name)
        weights = load_file(one / "student.safetensors")
        for tensor, value in load_file(other / "student.safetensors").items():
            torch.testing.assert_close(value, weights[tensor], rtol=1e-3, atol=1e-4, msg=f"{name}: {tensor}")
