"""A run's loss curve does not depend on which implementation of the prototype loss computes it."""

from pathlib import Path

import pytest

import rob
from rob.student_train.kernels import prototype_ce
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, train_student
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["embedding", "topk"])
def test_training_with_auto_follows_the_curve_of_the_plain_formula(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_beton(tmp_path, 32)
    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=2048)
    store = tiny_store(tmp_path / "targets.zarr", data, teacher, encoding=rob.Encoding(encoding))
    used: list[str] = []
    chunked = prototype_ce.chunked.prototype_cross_entropy
    monkeypatch.setattr(
        prototype_ce.chunked, "prototype_cross_entropy", lambda *a, **k: used.append("chunked") or chunked(*a, **k)
    )

    def curve(impl: str) -> list[float]:
        losses: list[float] = []
        config = rob.TrainConfig(
            data.path,
            tmp_path / impl,
            rob.StudentConfig("test_resnet", 32, True),
            rob.Cached(store.path),
            rob.ObjectiveConfig("dino", hidden_dim=32, bottleneck=32, loss_impl=impl),
            PairingConfig("cross", step_targets=2),
            rob.OptimiserConfig(lr=1e-2, warmup_epochs=0),
            epochs=3,
            loader=rob.LoaderConfig(batch_size=16, workers=1),
            log_every=1,
            device="cpu",
        )
        train_student(config, progress=TrainProgress(log=lambda line, total: losses.append(line["loss"])))
        return losses

    plain, fast = curve("reference"), curve("auto")
    assert used, "auto took the chunked loss"
    assert len(plain) == 6 and plain[0] != plain[-1]
    assert fast == pytest.approx(plain, rel=1e-4)
