"""Batches of planes, which a GPU makes the views from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import UNCHANGED
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, check_loader, geometry
from support.loaders import DINO, SETS, needs_ffcv, psnr, views_by_image
from support.photographs import photograph


@needs_ffcv
@pytest.mark.parametrize("raw", [False, True])
def test_planes_give_the_views_of_the_cpu_path(image_folder, tmp_path, raw):
    """In plain torch on the CPU; test_kernel_interpreted has the kernel, test_kernel_gpu the GPU."""
    from rob.common.views.ffcv_backend import FfcvBackend

    pack(PackConfig(str(image_folder), tmp_path / "data.beton", raw=raw))
    data, order = Beton(tmp_path / "data.beton"), np.random.default_rng(0).permutation(24)
    expected = views_by_image(ViewLoader(data, DINO, 3, LoaderConfig("ffcv", 24, 1)), order)
    seen, mean, std = 0, torch.zeros(3), torch.ones(3)
    for batch in FfcvBackend(data, DINO, 3, 7, 2, planes=True).epoch(order, SETS):
        neutral = tuple(torch.tensor(UNCHANGED).expand_as(c) for c in batch.colour)
        assert batch.views == ()
        for number, s in enumerate(SETS):
            views = replace(batch, colour=neutral).augment(number, 1.0, mean, std) * 255
            assert views.shape == (len(batch.image_ids), len(s.ids), 3, s.size, s.size)
            for b, image_id in enumerate(batch.image_ids.tolist()):
                for view, pixels in zip(views[b], expected[image_id][number], strict=True):
                    assert psnr(view, pixels) > 44
                    assert (view - pixels).abs().mean() < 1
                assert torch.equal(batch.colour[number][b], expected[image_id][2 + number])
                seen += 1
    assert seen == 24 * len(SETS)


def test_a_batch_is_augmented_as_its_views_are(backend, small_beton):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    for batch in ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 24, 1)).epoch(np.arange(24), SETS):
        for number, (views, colour) in enumerate(zip(batch.views, batch.colour, strict=True)):
            expected = apply_colours(views.flatten(0, 1), colour.flatten(0, 1), 0.3, mean, std)
            assert torch.equal(batch.augment(number, 0.3, mean, std).flatten(0, 1), expected)
            assert batch.augment(number, 0.3, mean, std, torch.bfloat16).dtype == torch.bfloat16


@needs_ffcv
@pytest.mark.parametrize("kind", ["raw", "left to Pillow"])
def test_images_that_are_not_decoded_at_a_smaller_scale_have_room(tmp_path, kind):
    """They used to be written whole into the room of the smaller ones, and over what lay behind."""
    folder = tmp_path / "in"
    folder.mkdir()
    for row in range(6):
        Image.fromarray(photograph(row, 400, 500)).save(folder / f"{row}.jpg", quality=95)
        if kind == "left to Pillow" and row % 2:
            stored = (folder / f"{row}.jpg").read_bytes()
            (folder / f"{row}.jpg").write_bytes(stored[:-2] + bytes(40) + stored[-2:])
    pack(PackConfig(str(folder), tmp_path / "data.beton", raw=kind == "raw"))
    data, sets = Beton(tmp_path / "data.beton"), [ViewSet((0, 1), 16)]
    fast, plain = (
        views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 6, 1)), np.arange(6), sets)
        for backend in ("ffcv", "torch")
    )
    for i in range(6):
        assert (fast[i][0].float() - plain[i][0].float()).abs().mean() < 2


def test_views_are_made_on_a_gpu_only_when_asked():
    pytest.importorskip("triton")
    pytest.importorskip("ffcv")
    assert geometry(LoaderConfig()) == geometry(LoaderConfig("ffcv")) == "planes"
    on_gpu = LoaderConfig("gpu")
    assert geometry(on_gpu) == "planes-gpu"
    check_loader(on_gpu, torch.device("cuda"))
    with pytest.raises(MisuseError, match="`backend` gpu makes the views on a CUDA device, and this runs on cpu"):
        check_loader(on_gpu, torch.device("cpu"))
    check_loader(LoaderConfig(), torch.device("cpu"))


def test_planes_become_the_same_views(small_beton):
    """Both stages make views through Batch.augment: from planes (here by the reference of the kernel) as from views."""
    pytest.importorskip("triton")
    pytest.importorskip("ffcv")
    mean, std = torch.zeros(3), torch.ones(3)
    batches = [
        next(iter(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 8, 1)).epoch(np.arange(8), SETS)))
        for backend in ("ffcv", "gpu")
    ]
    assert batches[1].planes is not None
    for number in range(len(SETS)):
        resized, made = (batch.to(torch.device("cpu")).augment(number, 0.2, mean, std) for batch in batches)
        assert resized.shape == made.shape
        assert (resized - made).abs().mean() < 2 / 255
