"""Every objective says the same of a view whoever made its target: a store in any encoding that serves, or the teacher."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import Recipe, get_recipe
from rob.student_train.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from rob.student_train.objectives.prototypes import PrototypeObjective
from rob.student_train.targets.branch import RunContext, TargetBranch
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import PairingConfig, plan_views
from rob.teacher_cache.teachers import Teacher, TeacherConfig, load_teacher
from support.objectives import OF_VIEWS
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

CPU = torch.device("cpu")
LOADER = LoaderConfig("torch", batch_size=8, workers=1)
IMAGES, PROTOTYPES, FEATURES = 24, 10, 20

ENCODINGS = {
    "float32": Encoding("embedding", "float32"),
    "float16": Encoding("embedding", "float16"),
    "int8": Encoding("embedding", "int8"),
    "dense": Encoding("dense"),
    "topk": Encoding("topk", k=PROTOTYPES),
}
CLOSE = {"float32": 1e-5, "float16": 1e-3, "int8": 2e-2, "dense": 3e-3, "topk": 3e-3}
"""Relative difference of the losses that an encoding's rounding may make."""

WITH_EMBEDDING = ("float32", "float16", "int8")
ALL_LOGITS = (*WITH_EMBEDDING, "dense")
CASES: list[tuple[str, dict, tuple[str, ...]]] = [
    ("embedding", {}, WITH_EMBEDDING),
    ("moco", {}, WITH_EMBEDDING),
    ("disco", {}, WITH_EMBEDDING),
    ("seed", {}, WITH_EMBEDDING),
    ("seed", {"teacher_temp": 0.05}, WITH_EMBEDDING),
    ("simreg", {}, WITH_EMBEDDING),
    ("disco", {"only_consistency": True}, WITH_EMBEDDING),
    ("dino", {}, (*ALL_LOGITS, "topk")),
    ("dino", {"head": "teacher"}, (*ALL_LOGITS, "topk")),
    ("dino", {"centre_targets": "running"}, ALL_LOGITS),
    ("dino", {"centre_targets": "checkpoint"}, (*ALL_LOGITS, "topk")),
    ("dino", {"sinkhorn": "batch"}, ALL_LOGITS),
    ("dino", {"sinkhorn": "batch", "koleo": 0.1}, ALL_LOGITS),
    ("ibot", {}, (*ALL_LOGITS, "topk")),
    ("swav", {}, ALL_LOGITS),
    ("swav", {"sinkhorn": "queue"}, ALL_LOGITS),
    ("msn", {"sinkhorn": "batch", "mean_entropy": 1.0}, ALL_LOGITS),
    ("msn", {}, (*ALL_LOGITS, "topk")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    return tiny_beton(tmp_path_factory.mktemp("data"), IMAGES)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    """As if its file had brought DINO's centre."""
    teacher = load_teacher(tiny_teacher_checkpoint(tmp_path_factory.mktemp("teacher"), prototypes=PROTOTYPES))
    teacher.centre = 0.1 * torch.randn(PROTOTYPES, generator=torch.Generator().manual_seed(0))
    return teacher


@pytest.fixture(scope="module")
def stored(data, teacher, tmp_path_factory) -> Callable[[str], TargetStore]:
    """The store of an encoding by name, made once."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def store(name: str) -> TargetStore:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rob.teacher_cache.cache.load_teacher", lambda config: teacher)
                settings = {"encoding": ENCODINGS[name], "loader": LOADER, "recipe": get_recipe("moco-v2")}
                made[name] = tiny_store(folder / name, data, TeacherConfig("test_efficientnet_gn"), **settings)
        return made[name]

    return store


def online(teacher: Teacher, store: TargetStore, data: Beton) -> TargetBranch:
    manifest = store.manifest
    config = Online(teacher, Recipe.from_dict(manifest.recipe), len(manifest.view_ids), manifest.view_size)
    return config.open(RunContext(data, CPU, seed=manifest.seed))


def cached(path: Path, data: Beton) -> TargetBranch:
    return Cached(path).open(RunContext(data, CPU))


def losses(branch: TargetBranch, data: Beton, config: ObjectiveConfig) -> tuple[Tensor, nn.Module]:
    """Of the three steps of one epoch on made-up features of the student, and the objective after them."""
    torch.manual_seed(0)
    objective = build_objective(config, FEATURES, branch.space, target_views=2, num_images=IMAGES)
    for layer in objective.head.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    pairing = PairingConfig(OBJECTIVES[config.name].pairing, step_targets=2)
    plan = plan_views(pairing, branch.views, epoch=0)
    loader = ViewLoader(data, branch.recipe, branch.seed, LOADER)
    sets, order = branch.view_sets(plan) or (ViewSet(plan.globals, 8),), torch.arange(IMAGES).numpy()
    student = torch.randn(IMAGES, 2, FEATURES, generator=torch.Generator().manual_seed(2))
    found = []
    with branch.targets(order, LOADER.batch_size, plan) as target_of:
        for batch in loader.epoch(order, sets):
            rows = student[torch.from_numpy(batch.image_ids)]
            found.append(objective(rows, target_of(batch), plan.pair_weights).detach())
    return torch.stack(found), objective


@pytest.mark.parametrize(
    ("name", "settings", "serve"),
    CASES,
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_the_same_losses_from_the_stores_and_from_the_teacher(data, teacher, stored, name, settings, serve):
    config = ObjectiveConfig(name, hidden_dim=16, **settings)
    expected, other = losses(online(teacher, stored(serve[0]), data), data, config)
    assert expected.unique().numel() == 3
    for encoding in serve:
        found, objective = losses(cached(stored(encoding).path, data), data, config)
        torch.testing.assert_close(
            found, expected, rtol=CLOSE[encoding], atol=0, msg=lambda text, e=encoding: f"{e}: {text}"
        )
        if encoding == "float32":
            for part, value in objective.state_dict().items():  # queues and centres too
                torch.testing.assert_close(value, other.state_dict()[part], rtol=1e-4, atol=1e-5)


def test_every_objective_is_compared():
    assert {name for name, _, _ in CASES} == set(OF_VIEWS)


@pytest.mark.parametrize("name", OF_VIEWS)
@pytest.mark.parametrize("encoding", ["dense", "topk"])
def test_encodings_that_do_not_serve_are_refused_in_one_sentence(data, stored, name, encoding):
    serves = any(encoding in serve for case, settings, serve in CASES if case == name and not settings)
    branch = cached(stored(encoding).path, data)
    if serves:
        build_objective(ObjectiveConfig(name), FEATURES, branch.space)
        return
    over_prototypes = issubclass(OBJECTIVES[name], PrototypeObjective)
    remedy = "embedding or dense" if over_prototypes else "embedding$"
    with pytest.raises(MisuseError, match=rf"needs .*the store holds .* cache with `encoding` {remedy}"):
        build_objective(ObjectiveConfig(name), FEATURES, branch.space)


def test_the_running_centre_needs_all_logits(data, stored):
    space = cached(stored("topk").path, data).space
    with pytest.raises(MisuseError, match="`centre_targets` running needs all the teacher's logits"):
        build_objective(ObjectiveConfig("dino", centre_targets="running"), FEATURES, space)


def test_the_store_keeps_the_centre_of_the_teachers_file(data, teacher, stored):
    for encoding in ENCODINGS:
        space = cached(stored(encoding).path, data).space
        torch.testing.assert_close(space.centre, teacher.centre)
        assert not torch.allclose(space.centre, space.mean_logits)


def test_a_teacher_without_prototypes_serves_embeddings_only(data, tmp_path: Path):
    plain = tiny_store(tmp_path / "t.zarr", data, tiny_teacher_checkpoint(tmp_path), loader=LOADER)
    space = cached(plain.path, data).space
    for name in OF_VIEWS:
        if issubclass(OBJECTIVES[name], PrototypeObjective):
            with pytest.raises(MisuseError, match=f"`objective` {name} needs prototype logits.* --prototypes K"):
                build_objective(ObjectiveConfig(name), FEATURES, space)
        else:
            build_objective(ObjectiveConfig(name), FEATURES, space)
