"""The linear probe of patch features: what it says of a network whose map tells the classes, and of one that has none."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rob.common.errors import MisuseError
from rob.student_train.evaluate.config import SegmentConfig
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.evaluate.segmentation.layouts import open_segmentation
from rob.student_train.evaluate.segmentation.linear import maps_of, segment, square

CPU = torch.device("cpu")


class Colours(nn.Module):
    """A map of the mean colour of every 4 x 4 pixels."""

    def forward_features(self, images):
        return nn.functional.avg_pool2d(images, 4)

    def forward_head(self, features):
        return features.mean((2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Red squares of a multiple of 8 px on green; a border of each mask is ignored."""
    root, random = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for part, number in (("train", 12), ("test", 6)):
        for row in range(number):
            labels = np.zeros((32, 48), np.uint8)
            top, left = random.integers(0, 3) * 8, random.integers(0, 4) * 8
            labels[top : top + 8, left : left + 16] = 1
            image = np.where(labels[..., None] == 1, [200, 40, 40], [40, 200, 40]).astype(np.uint8)
            labels[:2] = 255
            for kind, picture in (("images", image), ("masks", labels)):
                path = root / kind / part / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    (root / "classes.txt").write_text("grass\nbarn\n")
    return root


def network(embed, size=48) -> FrozenNetwork:
    return FrozenNetwork("colours", embed, size, (0.5,) * 3, (0.25,) * 3, "ab", CPU, interpolation="bilinear")


def test_what_a_map_tells_a_linear_layer_finds(folder):
    config = SegmentConfig(folder / "images" / "train", folder / "images" / "test", epochs=60, batch_size=4, lr=0.05)
    result = segment(network(Colours()), config)
    assert result.score.miou > 75  # of 4 px positions, interpolated
    assert result.score.iou.keys() == {"grass", "barn"}
    assert (result.positions, result.num_train, result.num_test) == (12, 12, 6)
    again = segment(network(Colours()), config)
    assert again == result


def test_maps_are_of_the_whole_image(folder):
    data = open_segmentation(folder / "images" / "test")
    maps = maps_of(network(Colours(), 32), data, None, lambda done, total: None)
    assert maps.shape == (6, 3, 8, 8)
    labels = torch.from_numpy(np.where(data.labels(2) == 255, 0, data.labels(2)))
    red = maps[2, 0].float() > 0
    middle = square(labels.numpy(), 8).bool()
    assert (red == middle).float().mean() > 0.9


def test_a_network_without_a_map_is_refused(folder):
    config = SegmentConfig(folder / "images" / "train", folder / "images" / "test")
    with pytest.raises(MisuseError, match="has no map of features to segment by"):
        segment(network(lambda images: images.flatten(1)), config)
