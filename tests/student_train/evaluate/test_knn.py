"""Weighted k-NN: by hand, and against scikit-learn on the same features."""

import numpy as np
import pytest
import torch

from rob.common.errors import MisuseError
from rob.common.run import exact_products
from rob.student_train.evaluate import knn as knn_module
from rob.student_train.evaluate.features import Features, brought_to
from rob.student_train.evaluate.knn import knn, knn_sweep
from support.gaussians import gaussian_classes


def test_votes_by_hand():
    """One near neighbour of class 0 outvotes two far ones of class 1 at a low temperature, and not at a high one."""
    train = Features(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1]))
    test = Features(torch.tensor([[10.0, 0.0]]), torch.tensor([0]))
    assert knn(train, test, k=3, temperature=0.07).top1 == 100
    assert knn(train, test, k=3, temperature=10).top1 == 0
    assert knn(train, test, k=1).top1 == 100


def test_low_temperatures_do_not_overflow():
    """exp(1 / .001) would: the nearest neighbour then decides alone."""
    train, test = gaussian_classes(300), gaussian_classes(100, seed=1)
    nearest = knn(train, test, k=1)
    assert knn(train, test, k=20, temperature=0.001).top1 == pytest.approx(nearest.top1, abs=2)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_agrees_with_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, test = gaussian_classes(3000, seed=1), gaussian_classes(1000, seed=2)
    reference = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.features.numpy(), train.labels.numpy())
    scores = reference.predict_proba(test.features.numpy())
    ranking, labels = np.argsort(-scores, axis=1), test.labels.numpy()
    ours = knn(train, test, k)
    assert 30 < ours.top1 < 95  # a task on which a wrong rule would show
    assert ours.top1 == pytest.approx(100 * (ranking[:, 0] == labels).mean(), abs=0.2)
    if k >= 20:  # of fewer neighbours, fifth places are ties at zero votes
        assert ours.top5 == pytest.approx(100 * (ranking[:, :5] == labels[:, None]).any(1).mean(), abs=0.2)


def test_a_sweep_and_small_batches_change_nothing(monkeypatch):
    train, test = gaussian_classes(500, seed=1), gaussian_classes(300, seed=2)
    whole = knn_sweep(train, test, (5, 20, 100))
    assert whole == tuple(knn(train, test, k) for k in (5, 20, 100))
    monkeypatch.setattr(knn_module, "SIMILARITY_BYTES", 4 * 7 * len(train))
    assert knn_sweep(train, test, (5, 20, 100)) == whole


def test_top5_of_few_classes_is_certain():
    train = gaussian_classes(60, num_classes=3, seed=1)
    result = knn(train, gaussian_classes(30, num_classes=3, seed=2), k=20)
    assert result.top5 == 100
    assert result.to_json()["num_train"] == 60


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(MisuseError, match="k = 20 neighbours of 10 training images"):
        knn(gaussian_classes(10), gaussian_classes(10), k=20)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_class_without_a_vote_is_not_among_the_five(k):
    """Of one neighbour, top-5 is top-1."""
    train, test = gaussian_classes(300, num_classes=10, seed=1), gaussian_classes(200, num_classes=10, seed=2)
    _, votes = knn_module.nearest_labels(train, test, k)
    voted = (votes == test.labels[:, None]).any(1).double().mean().item()
    assert knn(train, test, k=k).top5 == pytest.approx(100 * voted)
    assert knn(train, test, k=1).top5 == knn(train, test, k=1).top1


def test_a_gpu_searches_in_large_parts_and_multiplies_exactly(monkeypatch):
    """Whatever a training allows itself: TF32 would mix up near neighbours."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 30, 80 << 30))
    assert knn_module.similarity_bytes(torch.device("cuda", 0)) == 4 << 30
    assert knn_module.similarity_bytes(torch.device("cpu")) == 64_000_000
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    knn(gaussian_classes(60, seed=1), gaussian_classes(30, seed=2), k=5)
    assert asked == ["highest", "highest"]  # the second is what was before
    with pytest.raises(ValueError), exact_products():
        raise ValueError
    assert len(asked) == 4


def test_features_go_where_there_is_room(monkeypatch):
    train, test = gaussian_classes(60, seed=1), gaussian_classes(30, seed=2)
    moved = []
    monkeypatch.setattr(Features, "to", lambda self, device: moved.append((self, device)) or self)
    needed = 4 * train.features.nbytes + test.features.nbytes
    for device, free, there in (("cpu", 0, True), ("cuda", needed, True), ("cuda", needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        brought_to(torch.device(device), train, test)
        assert moved == ([(train, torch.device(device)), (test, torch.device(device))] if there else [])
        moved.clear()
