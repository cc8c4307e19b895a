"""What is cut off an image goes by the network, so that train and test images are seen alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from rob.common.views.loader import LoaderConfig
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.network import FrozenNetwork
from support.packing import packed
from support.photographs import photograph

LOADER = LoaderConfig("torch", batch_size=16, workers=1)
CPU = torch.device("cpu")


def test_one_larger_image_changes_nothing_for_the_others(tmp_path):
    """Of copies of the training images, each is its own nearest neighbour."""
    for split, extra in (("train", 64), ("test", 65)):
        for row in range(20):
            path = tmp_path / split / f"class{row % 5}" / f"{row:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            side = extra if row == 19 else 64
            Image.fromarray(photograph(row, side, side)).save(path)
    network, features = FrozenNetwork.pixels(32, CPU), []
    for split in ("train", "test"):
        (tmp_path / f"{split}-packed").mkdir()
        data = packed(tmp_path / split, tmp_path / f"{split}-packed", raw=True)
        features.append(network.features(data.path, LOADER))
    same = (features[0].features - features[1].features).abs().amax(1)[:19]
    assert float(same.max()) == 0
    assert knn(*features, k=1).top1 == 100


@pytest.mark.parametrize(
    ("size", "words"), [(32, "the whole square"), (64, "the whole square"), (96, "the middle 7/8")]
)
def test_the_table_says_what_is_seen(tmp_path, size, words):
    network = FrozenNetwork.pixels(size, CPU)
    assert network.title == f"pixels, {network.interpolation} to {size} px, {words}"
    image = np.zeros((96, 96, 3), np.uint8)
    image[:5] = 255  # within the sixteenth that is cut off
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "images" / "a" / "0.png")
    data = packed(tmp_path / "images", tmp_path, raw=True)
    pixels = network.features(data.path, LOADER).features.view(3, size, size)
    assert (float(pixels[:, 0].max()) > 0) == (words == "the whole square")
