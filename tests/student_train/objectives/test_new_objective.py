"""A paper is one class: defined here, it trains from a store, online, and against a momentum copy of the student."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rob
from rob.common.heads import ProjectionHead
from rob.student_train.config import READ
from rob.student_train.kernels import EmbeddingTarget, Target
from rob.student_train.objectives import OBJECTIVES, CopySettings, Objective, ObjectiveContext
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint


@pytest.fixture
def cosine() -> Iterator[str]:
    """The objective of that name, for one test."""

    class CosineObjective(Objective, name="cosine"):
        options = frozenset(("student_temp",))
        target_views = 1
        bottleneck = 12
        published = CopySettings(copy_momentum=0.9)

        def __init__(self, context: ObjectiveContext) -> None:
            super().__init__(context)
            self.weight = context.config.student_temp or 1.0
            self.head = ProjectionHead(context.num_features, context.config.hidden_dim, context.space.dim, num_layers=2)

        def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
            assert isinstance(target, EmbeddingTarget)
            cosine = torch.einsum("bvd,bgd->vg", self.embed(features), target.embedding) / len(features)
            return self.weight * (pair_weights * (1 - cosine)).sum()

    yield "cosine"
    del OBJECTIVES["cosine"], READ["cosine"]


@pytest.mark.parametrize("kind", ["cached", "online", "momentum"])
def test_one_class_trains_against_every_kind_of_target(cosine: str, kind: str, tmp_path: Path) -> None:
    data, teacher = tiny_beton(tmp_path, 24), tiny_teacher_checkpoint(tmp_path)
    targets = {
        "cached": lambda: rob.Cached(tiny_store(tmp_path / "targets.zarr", data, teacher).path),
        "online": lambda: rob.Online(rob.load_teacher(teacher), views=2, view_size=32),
        "momentum": lambda: rob.Momentum(copy_momentum=0.5),
    }[kind]()
    config = rob.TrainConfig(
        data.path, tmp_path / "run", rob.StudentConfig("test_resnet", 32, small_images=True), targets,
        rob.ObjectiveConfig(cosine, student_temp=2.0, hidden_dim=16), optimiser=rob.OptimiserConfig(lr=1e-2, warmup_epochs=0),
        epochs=4, device="cpu", loader=rob.LoaderConfig("torch", batch_size=8, workers=1), log_every=1,
    )  # fmt: skip
    result = rob.train_student(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert len({line["loss"] for line in lines}) == result.steps == 12
    told = json.loads((config.out / "config.json").read_text())
    assert (told["branch"]["kind"], told["objective"]["name"]) == (kind, "cosine")
    # Its paper has one target view in a step; replayed beside its copy, a lone view would meet none.
    assert told["pairing"]["step_targets"] == (2 if kind == "momentum" else 1)
    if kind == "momentum":
        assert told["branch"]["copy_momentum"] == 0.5
        assert (config.out / "student_average.safetensors").exists()
    else:
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_what_it_does_not_read_is_refused_by_its_name(cosine: str) -> None:
    with pytest.raises(rob.MisuseError, match="`queue` means nothing to `objective` cosine: it is for dino, moco"):
        rob.ObjectiveConfig(cosine, queue=10)
    with pytest.raises(rob.MisuseError, match="unknown objective 'cosin': did you mean cosine"):
        rob.ObjectiveConfig("cosin")
