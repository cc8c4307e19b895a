"""The two branches answer alike: what the store says, what the teacher says on the spot, and which images they belong to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import Batch, LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import Recipe, get_recipe
from rob.student_train.kernels import DenseTarget, EmbeddingTarget, TopKTarget
from rob.student_train.targets.branch import RunContext, TargetBranch
from rob.student_train.targets.cached import Cached, CachedTargets
from rob.student_train.targets.online import Online, OnlineTargets
from rob.student_train.targets.pairing import PairingConfig, ViewPlan, plan_views
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

CPU = torch.device("cpu")
LOADER = LoaderConfig("torch", batch_size=8, workers=1)
IMAGES, VIEWS, PROTOTYPES = 24, 3, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    return tiny_beton(tmp_path_factory.mktemp("data"), IMAGES)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory) -> TeacherConfig:
    return tiny_teacher_checkpoint(tmp_path_factory.mktemp("teacher"), prototypes=PROTOTYPES)


def cached(folder: Path, data: Beton, teacher: TeacherConfig, encoding: Encoding) -> TargetStore:
    settings = {"views": VIEWS, "encoding": encoding, "loader": LOADER, "recipe": get_recipe("moco-v2")}
    return tiny_store(folder / "targets.zarr", data, teacher, **settings)


@pytest.fixture(scope="module")
def store(data, with_head, tmp_path_factory) -> TargetStore:
    """Embeddings in single precision, three views. Not to be changed."""
    return cached(tmp_path_factory.mktemp("store"), data, with_head, Encoding("embedding", "float32"))


def online(teacher: TeacherConfig, store: TargetStore, data: Beton, views: int = VIEWS) -> OnlineTargets:
    """The branch that makes on the spot what ``store`` holds."""
    manifest = store.manifest
    config = Online(load_teacher(teacher), Recipe.from_dict(manifest.recipe), views, manifest.view_size)
    return config.open(RunContext(data, CPU, seed=manifest.seed))


def test_a_live_teacher_goes_where_the_run_is(with_head, data):
    there = Online(load_teacher(with_head), get_recipe("moco-v2")).open(RunContext(data, torch.device("meta")))
    assert there.space.prototypes is not None and there.space.prototypes.is_meta
    assert all(parameter.is_meta for parameter in there.teacher.parameters())


def opened(path: Path, data: Beton, **settings) -> CachedTargets:
    return Cached(path, **settings).open(RunContext(data, CPU))


def answers(branch: TargetBranch, data: Beton, order: np.ndarray, plan: ViewPlan) -> list:
    """The targets of one epoch, batch by batch."""
    loader = ViewLoader(data, branch.recipe, branch.seed, LOADER)
    sets = branch.view_sets(plan) or (ViewSet(plan.globals, 8),)
    with branch.targets(order, LOADER.batch_size, plan) as target_of:
        return [target_of(batch) for batch in loader.epoch(order, sets)]


@pytest.fixture
def plan() -> ViewPlan:
    """Views 2 and 0, in that order."""
    return plan_views(PairingConfig("same", step_targets=2), VIEWS, epoch=1)


@pytest.fixture
def order() -> np.ndarray:
    return np.random.default_rng(0).permutation(IMAGES)


def test_cached_targets_are_the_stores_rows_in_the_order_asked(store, data, plan, order):
    targets = answers(opened(store.path, data), data, order, plan)
    assert [len(target.embedding) for target in targets] == [8, 8, 8]
    rows = store.read(0, IMAGES)["embedding"]
    for target, ids in zip(targets, order.reshape(3, 8), strict=True):
        assert plan.targets == (2, 0)
        np.testing.assert_array_equal(target.embedding.numpy(), rows[ids][:, [2, 0]])
        np.testing.assert_array_equal(target.prototypes.numpy(), store.prototypes)


def test_the_online_teacher_says_what_was_cached(store, data, with_head, plan, order):
    from_cache = answers(opened(store.path, data), data, order, plan)
    from_teacher = answers(online(with_head, store, data), data, order, plan)
    for one, other in zip(from_cache, from_teacher, strict=True):
        torch.testing.assert_close(one.embedding, other.embedding, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.prototypes, other.prototypes)
    elsewhere = answers(online(with_head, store, data), data, order[::-1].copy(), plan)[0].embedding
    assert (elsewhere - from_cache[0].embedding).abs().max() > 0.01  # the comparison can fail


def test_autograd_may_save_what_the_online_teacher_says(store, data, with_head, plan, order):
    embedding = answers(online(with_head, store, data), data, order, plan)[0].embedding
    weight = torch.ones(embedding.shape[-1], requires_grad=True)
    (embedding * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("encoding", "kind"), [(Encoding("topk", k=4), TopKTarget), (Encoding("dense"), DenseTarget)], ids=["topk", "dense"]
)
def test_logits_are_those_of_the_teacher(data, with_head, store, tmp_path, plan, order, encoding, kind):
    branch = opened(cached(tmp_path, data, with_head, encoding).path, data)
    target = answers(branch, data, order, plan)[0]
    assert isinstance(target, kind)
    assert target.num_prototypes == PROTOTYPES
    rows = torch.from_numpy(store.read(0, IMAGES)["embedding"][order[:8]][:, [2, 0]])
    logits = rows @ torch.from_numpy(store.prototypes).T
    if isinstance(target, TopKTarget):
        logits = logits.gather(2, target.ids.long())
        assert target.tail.shape == (8, 2, len(encoding.temps))
    torch.testing.assert_close(target.logits.float(), logits, rtol=0, atol=2e-3)


def test_the_space_tells_what_the_targets_are(data, with_head, store, tmp_path):
    rows = torch.from_numpy(store.read(0, IMAGES)["embedding"])
    prototypes = torch.from_numpy(store.prototypes)
    space = opened(store.path, data).space
    assert (space.dim, space.num_prototypes, space.has_embedding) == (24, PROTOTYPES, True)
    torch.testing.assert_close(space.mean_embedding, rows.mean((0, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(space.mean_logits, (rows @ prototypes.T).mean((0, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(space.prototypes, prototypes)

    logits = opened(cached(tmp_path, data, with_head, Encoding("dense")).path, data).space
    assert not logits.has_embedding
    assert space.has_all_logits and logits.has_all_logits
    torch.testing.assert_close(logits.mean_logits, space.mean_logits, rtol=0, atol=1e-5)
    topk = opened(cached(tmp_path / "topk", data, with_head, Encoding("topk", k=4)).path, data).space
    assert not (topk.has_embedding or topk.has_all_logits)
    on_the_spot = online(with_head, store, data).space
    torch.testing.assert_close(on_the_spot.prototypes, prototypes)
    assert (on_the_spot.dim, on_the_spot.num_prototypes, on_the_spot.has_embedding) == (24, PROTOTYPES, True)
    assert on_the_spot.teacher_temp == space.teacher_temp == load_teacher(with_head).teacher_temp


def test_one_branch_serves_epoch_after_epoch(store, data):
    branch = opened(store.path, data, cache_in_memory=True)
    rows = store.read(0, IMAGES)["embedding"]
    for epoch in range(3):
        plan = plan_views(PairingConfig("same", step_targets=1), VIEWS, epoch)
        order = np.random.default_rng(epoch).permutation(IMAGES)
        found = torch.cat([target.embedding for target in answers(branch, data, order, plan)])
        np.testing.assert_array_equal(found[:, 0].numpy(), rows[order, epoch])


def test_targets_of_other_images_than_the_batchs_never_pass(store, data, plan, order):
    branch = opened(store.path, data)
    with branch.targets(order, 8, plan) as target_of, pytest.raises(AssertionError, match="same order"):
        target_of(Batch(order[:8][::-1].copy(), (), ()))


def test_a_teacher_without_a_head_has_no_prototypes(data, tmp_path, plan, order):
    teacher = tiny_teacher_checkpoint(tmp_path)
    plain = cached(tmp_path, data, teacher, Encoding("embedding"))
    for branch in (opened(plain.path, data), online(teacher, plain, data)):
        assert (branch.space.num_prototypes, branch.space.prototypes, branch.space.mean_logits) == (0, None, None)
        target = answers(branch, data, order, plan)[0]
        assert isinstance(target, EmbeddingTarget)
        assert (target.prototypes, target.num_prototypes) == (None, 0)


def test_a_store_of_another_data_set_is_refused(store, tmp_path):
    with pytest.raises(MisuseError, match="another data set"):
        opened(store.path, tiny_beton(tmp_path, IMAGES, seed=1))


def test_the_description_tells_teachers_views_and_ways_apart(store, data, with_head, tmp_path):
    told = opened(store.path, data).description
    assert told["weights_hash"] == load_teacher(with_head).weights_hash
    branch = online(with_head, store, data)
    assert told["kind"] == "cached" != branch.description["kind"]
    other = tiny_teacher_checkpoint(tmp_path, seed=1, prototypes=PROTOTYPES)
    assert online(other, store, data).description["weights_hash"] != branch.description["weights_hash"]
    more = online(with_head, store, data, VIEWS + 1)
    assert more.description["views"] == VIEWS + 1 != branch.description["views"]
