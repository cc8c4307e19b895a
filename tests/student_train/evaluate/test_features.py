"""Features by image id, their cache, labels and classes that do not fit."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rob.common.errors import FailureError, MisuseError
from rob.common.views.config import LoaderConfig
from rob.common.weights import hash_weights
from rob.student_train.evaluate import features
from rob.student_train.evaluate.features import (
    FeatureKey,
    Features,
    cached_features,
    extract_features,
    flatten_pixels,
    labels_of,
    same_classes,
)
from rob.student_train.evaluate.labelled import labelled_images
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig
from support.packing import packed
from support.tiny import tiny_images

IMAGES = torch.arange(10 * 3 * 4 * 4, dtype=torch.float32).view(10, 3, 4, 4)


def batches(order, size=4):
    ids = torch.tensor(order)
    return [(chunk, IMAGES[chunk]) for chunk in ids.split(size)]


def test_rows_follow_image_ids_and_not_arrival():
    shuffled = extract_features(flatten_pixels, batches([7, 3, 9, 0, 1, 8, 2, 6, 4, 5]), 0, 10)
    assert torch.equal(shuffled, IMAGES.flatten(1))


def test_an_image_that_never_came_is_a_failure():
    with pytest.raises(FailureError, match="9 of 10 images"):
        extract_features(flatten_pixels, batches(range(9)), 0, 10)


def test_a_module_runs_in_eval_mode_and_keeps_its_own():
    backbone = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extracted = extract_features(backbone, batches(range(10)), 0, 10)
    assert backbone.training
    assert not extracted.requires_grad
    torch.testing.assert_close(dict(backbone.state_dict()), before)


def test_a_part_is_counted_from_its_start():
    assert torch.equal(extract_features(flatten_pixels, batches([7, 6, 5]), 5, 8), IMAGES[5:8].flatten(1))


def test_untrained_networks_of_equal_weights_and_other_strides_share_no_features():
    forms = [StudentConfig("mobilenetv2_035", 64, small_images=small) for small in (True, False, True)]
    small, usual, again = (FrozenNetwork.random_student(form, 0, torch.device("cpu")) for form in forms)
    weights = [dict(network.embed.state_dict()) for network in (small, usual)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert small.source == again.source != usual.source


def test_a_teacher_of_the_users_own_with_another_normalisation_has_other_features(tmp_path):
    (tmp_path / "packed").mkdir()
    data = packed(tiny_images(tmp_path / "images", 2), tmp_path / "packed")
    network, loader = FrozenNetwork.pixels(8, torch.device("cpu")), LoaderConfig("torch", 8, 1)
    before = network.extract(data, loader, tmp_path / "run")
    mended = replace(network, mean=(0.0,) * 3).extract(data, loader, tmp_path / "run")
    torch.testing.assert_close(mended, before + 2)  # 0.5 / 0.25


def test_labels_that_cannot_be_evaluated_are_told_before_anything_is_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenNetwork, "extract", lambda *_: pytest.fail("features were extracted"))
    network, loader = FrozenNetwork.pixels(8, torch.device("cpu")), LoaderConfig("torch", 8, 1)
    paths = {}
    for name, classes in (("train", 2), ("other", 3), ("flat", 1)):
        images = tiny_images(tmp_path / name, 3, classes=classes)
        (tmp_path / f"{name}-packed").mkdir()
        paths[name] = packed(images / "class0" if name == "flat" else images, tmp_path / f"{name}-packed").path
    for test, sentence in (
        (None, "class 'class1' has one image, none is left to train on"),
        ("other", "class 'class2' of the test set is not in the training set"),
        ("flat", "has no labels"),
    ):
        with pytest.raises(MisuseError, match=sentence):
            labelled_images(network, paths["train"], test and paths[test], loader)


def test_features_are_extracted_once_for_each_key(tmp_path):
    calls = []

    def extract(start, stop):
        calls.append((start, stop))
        return torch.full((stop - start, 2), float(len(calls)))

    key = FeatureKey("weights", "data", 32)
    assert torch.equal(cached_features(tmp_path, key, 3, extract), cached_features(tmp_path, key, 3, extract))
    assert calls == [(0, 3)]
    for other in (FeatureKey("other", "data", 32), FeatureKey("weights", "new", 32), FeatureKey("weights", "data", 64)):
        cached_features(tmp_path, other, 3, extract)
    assert len(calls) == 4


def test_killed_extraction_goes_on_and_damage_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
    rows = torch.arange(20.0).view(10, 2)
    calls = []

    def extract(start, stop):
        calls.append((start, stop))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows[start:stop]

    key = FeatureKey("weights", "data", 32)
    with pytest.raises(KeyboardInterrupt):
        cached_features(tmp_path, key, 10, extract)
    assert torch.equal(cached_features(tmp_path, key, 10, extract), rows)
    assert calls == [(0, 4), (4, 8), (4, 8), (8, 10)]
    shard = key.folder(tmp_path) / "000000004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    for _ in range(2):
        assert torch.equal(cached_features(tmp_path, key, 10, extract), rows)
    assert calls[4:] == [(4, 8)]


def test_what_is_usual_lies_where_it_lay(tmp_path):
    """A folder's name is what it was before there was a choice; other features and another filter have their own."""
    usual = FeatureKey("weights", "data", 32)
    assert usual.folder(tmp_path).name == "c2d88694fa31c6a0"
    kinds = product(("cls", "cls4"), ("bilinear", "bicubic"))
    others = {FeatureKey("weights", "data", 32, *kind) for kind in kinds}
    others.add(FeatureKey("weights", "data", 32, interpolation="bicubic"))
    others.add(FeatureKey("weights", "data", 32, geometry="pillow"))
    assert len({key.folder(tmp_path) for key in (usual, *others)}) == 7


def test_weights_hash_sees_names_types_and_values():
    layer = nn.Linear(3, 3)
    first = hash_weights(layer.state_dict())
    assert first == hash_weights(layer.state_dict())
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    changed = hash_weights(layer.state_dict())
    assert changed != first
    assert hash_weights(nn.Sequential(layer).state_dict()) != changed != hash_weights(layer.bfloat16().state_dict())


def test_missing_labels_are_named():
    images = SimpleNamespace(named=Path("a.beton"), manifest=SimpleNamespace(paths=("x.png", "y.png", "z.png")))
    images.labels = None
    with pytest.raises(MisuseError, match=r"a\.beton has no labels: pack a folder"):
        labels_of(images)
    images.labels = np.array([0, -1, 2])
    with pytest.raises(MisuseError, match=r"a\.beton: 1 of 3 images have no label, the first is y\.png: .*pack again"):
        labels_of(images)


def test_classes_meet_by_name():
    train = Features(torch.zeros(3, 2), torch.tensor([0, 1, 2]), ("bird", "cat", "dog"))
    test = Features(torch.zeros(2, 2), torch.tensor([1, 0]), ("cat", "dog"))  # no bird: its numbers are other ones
    assert same_classes(train, test).labels.tolist() == [2, 1]


def test_a_class_the_training_set_lacks_is_refused():
    train = Features(torch.zeros(2, 2), torch.tensor([0, 1]), ("bird", "cat"))
    with pytest.raises(MisuseError, match="'dog' of the test set is not in the training set"):
        same_classes(train, Features(torch.zeros(2, 2), torch.tensor([0, 1]), ("cat", "dog")))
    with pytest.raises(MisuseError, match="class 5 of the test set has no image in the training set"):
        same_classes(Features(torch.zeros(2, 2), torch.tensor([0, 1])), Features(torch.zeros(1, 2), torch.tensor([5])))
    with pytest.raises(MisuseError, match="'cat' of the test set has no image"):
        same_classes(train.rows([0]), train)
    with pytest.raises(MisuseError, match="2 dimensions cannot be tested on 3"):
        same_classes(train, Features(torch.zeros(2, 3), torch.tensor([0, 1]), ("bird", "cat")))


@pytest.mark.parametrize("order", [range(10), [7, 3, 9, 0, 1, 8, 2, 6, 4, 5]])
def test_a_gpu_is_seldom_waited_for(monkeypatch, order):
    """Every second batch here, and what is left at the end: the same features."""
    monkeypatch.setattr(features, "bytes_to_fetch", lambda device: 5 * 4 * IMAGES[0].numel())
    fetches, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetches.append(self.dtype) or cpu(self))
    extracted = extract_features(flatten_pixels, batches(list(order)), 0, 10)
    assert fetches.count(torch.float32) == 2
    assert torch.equal(extracted, IMAGES.flatten(1))
