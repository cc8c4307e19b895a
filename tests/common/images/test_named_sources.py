"""Named data sets as sources of images; ``test_pack`` has folders."""

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.sources import named
from support.packing import packed
from support.photographs import photograph


def test_fashion_mnist_from_debian(tmp_path):
    if not named.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    data = packed("fashion-mnist", tmp_path, raw=True, split="test", limit=500)
    assert data.manifest.paths[:2] == ("test/0000", "test/0020")
    assert data.manifest.classes[9] == "Ankle boot"
    assert data.labels[0] == 9
    assert np.bincount(data.labels).min() > 30
    image = data.image(0)
    assert image.shape == (28, 28, 3)
    assert (image[..., 0] == image[..., 2]).all()


class FakeCifar(list):
    """As torchvision's: made with root, train and download; (image, label) by index; class names."""

    classes = ("plane", "ship")

    def __init__(self, root: str, train: bool, download: bool):
        assert download
        super().__init__((Image.fromarray(photograph(row)), row % 2) for row in range(12 if train else 5))


def test_named_data_set_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    data = packed("cifar10", tmp_path, raw=True)
    assert data.manifest.paths == tuple(f"train/{row:02}" for row in range(12))
    assert data.manifest.classes == ("plane", "ship")
    assert data.labels.tolist() == [0, 1] * 6
    assert np.array_equal(data.image(7), photograph(7))
    assert packed("cifar10", tmp_path, split="test").num_images == 5


def test_unknown_split(tmp_path):
    with pytest.raises(MisuseError, match=r"unknown split of cifar10 'tests': did you mean test\?"):
        packed("cifar10", tmp_path, split="tests")


def test_failed_download_is_one_sentence(tmp_path, monkeypatch):
    def offline(**_):
        raise RuntimeError("Error downloading cifar")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(FailureError, match=r"could not download cifar10 to .*cache/rob/cifar10 \(Error downloading"):
        packed("cifar10", tmp_path)


def test_every_named_data_set_exists_in_torchvision():
    from torchvision import datasets

    for class_name, _ in named.NAMED.values():
        assert hasattr(datasets, class_name)
