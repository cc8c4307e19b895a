"""The two back ends of the loader give the same views."""

import numpy as np
import pytest
import torch
from PIL import Image

from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.views.drawing import LOCAL
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from support.loaders import DINO, needs_ffcv, psnr, views_by_image
from support.photographs import photograph


@needs_ffcv
def test_both_backends_give_the_same_views(small_beton):
    fast, plain = (
        views_by_image(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 24, 1)), np.arange(24))
        for backend in ("ffcv", "torch")
    )
    for i in range(24):
        for a, b in zip(fast[i][:2], plain[i][:2], strict=True):
            assert min(map(psnr, a, b)) > 38
        assert torch.equal(fast[i][2], plain[i][2])


@needs_ffcv
def test_both_backends_give_the_same_views_of_photographs_at_every_decode_scale(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the sample photographs")
    folder = tmp_path / "in"
    folder.mkdir()
    for row, pixels in enumerate(datasets.load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"{row}.jpg", quality=90)
        Image.fromarray(pixels[100:250, 200:350]).save(folder / f"{row}-small.jpg", quality=90, subsampling=0)
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    for sets in (
        [ViewSet((0, 1), 224), ViewSet((LOCAL, LOCAL + 1), 96)],
        [ViewSet((0, 1, 2), 40)],
        [ViewSet((0,), 12)],
    ):
        fast, plain = (
            views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 4, 1)), np.arange(4), sets)
            for backend in ("ffcv", "torch")
        )
        for i in range(4):
            for a, b in zip(fast[i][: len(sets)], plain[i][: len(sets)], strict=True):
                assert min(map(psnr, a, b)) > 38
                assert (a.float() - b.float()).abs().mean() < 2


@needs_ffcv
def test_both_backends_give_nearly_the_same_pixels_of_uncompressed_images(image_folder, tmp_path):
    pack(PackConfig(str(image_folder), tmp_path / "raw.beton", raw=True))
    fast, plain = (
        views_by_image(ViewLoader(Beton(tmp_path / "raw.beton"), DINO, 3, LoaderConfig(backend, 24, 1)), np.arange(24))
        for backend in ("ffcv", "torch")
    )
    for i in range(24):
        for a, b in zip(fast[i][:2], plain[i][:2], strict=True):
            assert (a.int() - b.int()).abs().max() <= 2


def test_images_that_were_grey_or_had_odd_sizes(backend, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(photograph(0)[..., 0]).save(folder / "grey.jpg")
    for height, width in ((1, 1), (1, 30), (17, 31)):
        Image.fromarray(photograph(1)[:height, :width]).save(folder / f"{height}x{width}.jpg")
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    seen = views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 3, 2)), np.arange(4))
    grey = seen[data.manifest.paths.index("grey.jpg")][0].int()
    assert (grey - grey[:, :1]).abs().max() <= 3
    assert len(seen) == 4


@needs_ffcv
def test_what_only_pillow_can_decode_is_decoded(tmp_path):
    """Stray bytes behind a marker: common in old photographs, and an error to libjpeg-turbo's simple interface."""
    pixels = photograph(0)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "0.jpg", quality=95)
    stored = (folder / "0.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(stored[:-2] + bytes(40) + stored[-2:])
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    assert data.sizes[1] == data.sizes[0] + 40, "packed as it is"
    sets = [ViewSet((0,), 24)]
    fast, plain = (
        views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 2, 1)), np.arange(2), sets)
        for backend in ("ffcv", "torch")
    )
    assert (fast[1][0].int() - plain[1][0].int()).abs().max() <= 2
