"""The view kernels on CPU tensors, under Triton's interpreter: what they compute, not their speed, and not a GPU.

TRITON_INTERPRET has to be set before triton is first imported, so this file runs itself again in a process of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is a Linux package")
pytest.importorskip("rob.common.views.decode", reason="ffcv is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout

else:
    import torch

    from rob.common.views import kernel
    from rob.common.views.colours import apply_colours_torch
    from rob.common.views.kernel import views_from_planes
    from rob.common.views.kernel_colours import apply_colours_triton
    from rob.common.views.reference import views_from_planes as reference
    from support.interpreter import scalars_index
    from support.view_cases import (
        JITTERS,
        MEAN,
        RAW_COLOUR,
        STD,
        STORED,
        batch_of_two,
        cases,
        neutral,
        pillow_views,
        psnr,
        resized_on_cpu,
        stored_photograph,
    )

    @pytest.fixture(autouse=True)
    def any_triton(monkeypatch):
        scalars_index(monkeypatch)

    WHOLE = [(stored, 1) for stored in STORED]
    SCALED = [*(("4:2:0", scale) for scale in (2, 4, 8)), ("4:4:4", 2), ("4:2:2", 4), ("grey", 8)]

    @pytest.mark.parametrize(
        ("stored", "scale", "cubic"),
        [(*case, False) for case in WHOLE + SCALED] + [(*case, True) for case in (*WHOLE, ("4:2:0", 2), ("grey", 8))],
    )
    def test_resized_as_pillow_and_as_the_cpu_path_do(stored, scale, cubic):
        """At every decode scale, flipped and not, of one tile and of four."""
        image, geometry, size, planes = cases(stored, scale, cubic)
        colour = neutral(len(geometry))
        views = views_from_planes(planes, 0, size, colour, 1.0, *RAW_COLOUR, torch.float32)[0] * 255
        for view, plain, cpu in zip(
            views, pillow_views(image, geometry, size, cubic), resized_on_cpu(planes, size), strict=True
        ):
            assert psnr(view, plain) > 38
            assert (view - cpu).abs().mean() <= 1
            assert psnr(view, cpu) > 44
        exact = reference(planes, 0, size, colour, 1.0, *RAW_COLOUR, torch.float32)[0] * 255
        assert (views - exact).abs().max() < 0.5  # of 255: weights and strips are rounded to float16

    @pytest.mark.parametrize("name", JITTERS)
    def test_colours_are_those_of_the_torch_formulas(name):
        """The reference colours with ``apply_colours_torch``. Four tiles, of which all but one are part of one."""
        size = 37
        planes, colour = stored_photograph(JITTERS[name])
        ours, exact = (
            f(planes, 0, size, colour, 0.8, MEAN, STD, torch.float32) for f in (views_from_planes, reference)
        )
        error = (ours - exact).abs() * STD.view(3, 1, 1) * 255
        assert error.mean() < 0.1
        assert (error > 0.5).float().mean() < 2e-3  # to either side of a threshold: solarise, or the largest channel
        assert (exact - reference(planes, 0, size, neutral(1), 0.8, MEAN, STD, torch.float32)).abs().mean() > 0.002

    @pytest.mark.parametrize(("size", "names"), [(9, JITTERS), (37, ("contrast", "a large blur", "everything"))])
    def test_colours_of_resized_views_are_those_of_the_torch_formulas(size, names):
        """One block and two of them, neither full; every jitter in one batch, with views that change nothing among them."""
        colour = torch.cat([neutral(1, **JITTERS[name])[0] for name in names] + [neutral(2)[0]])
        random = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (len(colour), 3, size, size), dtype=torch.uint8, generator=random)
        ours, exact = (f(images, colour, 0.8, MEAN, STD) for f in (apply_colours_triton, apply_colours_torch))
        error = (ours - exact).abs() * STD.view(3, 1, 1) * 255
        assert error.mean() < 0.05
        assert (error > 0.5).float().mean() < 2e-3
        half = apply_colours_triton(images, colour, 0.8, MEAN, STD, torch.float16)  # the interpreter cuts bfloat16 off
        assert half.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(half, ours.half())  # what autocast would make of it
        assert apply_colours_triton(images[:0], colour[:0], 0.8, MEAN, STD).shape == (0, 3, size, size)

    def test_some_views_of_several_images_in_bfloat16():
        """The views of a set lie behind those of the sets before it."""
        planes, colour = batch_of_two()
        ours = views_from_planes(planes, 1, 17, colour, 1.0, MEAN, STD, torch.bfloat16)
        exact = reference(planes, 1, 17, colour, 1.0, MEAN, STD, torch.float32)
        assert ours.dtype == torch.bfloat16
        assert ours.shape == (2, 3, 3, 17, 17)
        assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert float((ours.float() - exact).abs().max()) < 0.03
        assert len(exact.flatten(2).mean(2).unique()) == 6

    @pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
    def test_wider_strips_change_nothing_but_roundings(monkeypatch, cubic):
        """As newer GPUs have them."""
        _, geometry, size, planes = cases("4:2:2", 1, cubic)
        colour, found = neutral(len(geometry)), []
        for columns in (kernel.COLUMNS, kernel.WIDE):
            monkeypatch.setattr(kernel, "wide_columns", lambda device, columns=columns: columns)
            found.append(views_from_planes(planes, 0, size, colour, 1.0, *RAW_COLOUR, torch.float32))
        assert (found[0] - found[1]).abs().max() * 255 < 0.5

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_tiny_views(size):
        planes, colour = stored_photograph(JITTERS["everything"])
        ours, exact = (
            f(planes, 0, size, colour, 1.0, MEAN, STD, torch.float32) for f in (views_from_planes, reference)
        )
        assert ours.isfinite().all()
        assert (ours - exact).abs().max() < 0.02

    def test_no_images():
        planes, colour = stored_photograph(JITTERS["everything"])
        assert views_from_planes(planes, 0, 8, colour[:0], 1.0, MEAN, STD, torch.float32).shape == (0, 1, 3, 8, 8)
