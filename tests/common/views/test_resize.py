"""One image to views in compiled code, against Pillow; ``test_loader`` has the whole way from a file."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rob.common.images.beton import JPEG, RAW
from rob.common.views.pillow_backend import resize_view
from support.photographs import photograph

decode = pytest.importorskip("rob.common.views.decode", reason="ffcv is not installed")
resize = pytest.importorskip("rob.common.views.resize")

from rob.common.views.planes import KIND, UNDECODED  # noqa: E402
from support.stored_images import SUBSAMPLING, decoded, jpeg, planes_of  # noqa: E402

CUBIC = pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])


def views_of(
    stored: np.ndarray, mode: int, shape: tuple[int, ...], geometry, sizes, scale: int = 1, cubic: bool = False
) -> list[np.ndarray]:
    """The views of one stored image, each (size, size, 3)."""
    planes, plane_starts, layout = planes_of(stored, mode, *shape[:2], scale)
    assert layout[0, KIND] != UNDECODED
    sizes = np.array(sizes)
    starts = np.concatenate([[0], np.cumsum(3 * sizes**2)])
    out = np.zeros(starts[-1] + 1, np.uint8)
    places = np.stack([starts[:-1], np.zeros_like(sizes)], 1)
    resize.resize_views(planes, plane_starts, layout, np.array([geometry], np.int32), sizes, places, 0, cubic, out)
    assert out[-1] == 0, "wrote behind the last view"
    return [
        out[a:b].reshape(3, s, s).transpose(1, 2, 0)
        for a, b, s in zip(starts, starts[1:], sizes.tolist(), strict=False)
    ]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def boxes(height: int, width: int):
    """Any crop of an image, and any flip."""

    @st.composite
    def box(draw):
        h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
        return [draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w, draw(st.integers(0, 1))]

    return box()


# --- uncompressed images: only the filter ---


@given(boxes(53, 71), st.integers(1, 80), st.booleans())
def test_the_filters_are_pillows(box, size, cubic):
    """To the rounding of weights and of two passes in eight bits; noise is the hardest picture for it."""
    noise = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    if (
        cubic
    ):  # within bytes also where it overshoots: Pillow goes along first, and what it cuts off there is not the same
        noise = noise // 2 + 64
    (view,) = views_of(noise.ravel(), RAW, noise.shape, [box], [size], cubic=cubic)
    difference = np.abs(view.astype(int) - resize_view(Image.fromarray(noise), box, size, cubic))
    assert difference.max() <= 3
    assert difference.mean() <= 1 or size < 8


@CUBIC
def test_a_crop_that_is_not_resized_is_kept_bit_for_bit(cubic):
    pixels = photograph(0)
    (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [[3, 5, 40, 40, 0]], [40], cubic=cubic)
    np.testing.assert_array_equal(view, pixels[3:43, 5:45])
    (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [[3, 5, 40, 40, 1]], [40], cubic=cubic)
    np.testing.assert_array_equal(view, pixels[3:43, 5:45][:, ::-1])


@CUBIC
@pytest.mark.parametrize("value", [0, 1, 255])
@pytest.mark.parametrize("size", [1, 33, 100])
def test_a_flat_image_stays_flat(value, size, cubic):
    pixels = np.full((37, 41, 3), value, np.uint8)
    (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [[1, 2, 33, 35, 0]], [size], cubic=cubic)
    assert (view == value).all()


@CUBIC
def test_nothing_outside_the_crop_is_seen(cubic):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[20:40, 20:40] = 200
    for size in (5, 20, 50):
        (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [[20, 20, 20, 20, 0]], [size], cubic=cubic)
        assert (view == 200).all()


def test_the_cubics_overshoot_ends_at_black_and_white():
    """Beside an edge it goes beyond both, by a tenth."""
    pixels = np.zeros((30, 30, 3), np.uint8)
    pixels[:, 15:] = 255
    (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [[0, 0, 30, 30, 0]], [77], cubic=True)
    expected = resize_view(Image.fromarray(pixels), [0, 0, 30, 30, 0], 77, cubic=True)
    assert np.abs(view.astype(int) - expected).max() <= 4
    assert {0, 255} <= set(view.ravel().tolist())


@CUBIC
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("size", [1, 40])
def test_tiny_images(shape, size, cubic):
    low, high = (64, 192) if cubic else (0, 256)  # as above
    pixels = np.random.default_rng(0).integers(low, high, (*shape, 3), dtype=np.uint8)
    box = [0, 0, *shape, 0]
    (view,) = views_of(pixels.ravel(), RAW, pixels.shape, [box], [size], cubic=cubic)
    assert np.abs(view.astype(int) - resize_view(Image.fromarray(pixels), box, size, cubic)).max() <= (
        4 if cubic else 2
    )


# --- JPEG ---


@CUBIC
@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize("shape", [(47, 63), (33, 17), (7, 5), (1, 1), (3, 100)])
def test_jpegs_of_any_size_and_subsampling(subsampling, shape, cubic):
    pixels = photograph(1, 48, 100)[: shape[0], : shape[1]]
    stored = jpeg(pixels, subsampling=SUBSAMPLING[subsampling])
    boxes_ = [[0, 0, *shape, 0], [shape[0] // 4, shape[1] // 4, shape[0] // 2 + 1, shape[1] // 2 + 1, 1]]
    if min(shape) == 1:
        boxes_ = boxes_[:1]
    sizes = [24, 37][: len(boxes_)]
    image = Image.fromarray(decoded(stored))
    for view, box, size in zip(views_of(stored, JPEG, shape, boxes_, sizes, cubic=cubic), boxes_, sizes, strict=True):
        assert psnr(view, resize_view(image, box, size, cubic)) > 36


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"optimize": True}, {"quality": 100}, {"restart_marker_rows": 1}]
)
def test_jpegs_of_any_coding(options):
    pixels = photograph(2)
    stored = jpeg(pixels, **options)
    (view,) = views_of(stored, JPEG, pixels.shape, [[0, 0, 48, 64, 0]], [32])
    assert psnr(view, resize_view(Image.fromarray(decoded(stored)), [0, 0, 48, 64, 0], 32)) > 40


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Two real ones, 427 x 640."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the sample photographs")
    return list(datasets.load_sample_images().images)


@CUBIC
@pytest.mark.parametrize("subsampling", SUBSAMPLING)
def test_photographs_are_within_38_db_of_pillow(photographs, subsampling, cubic):
    random = np.random.default_rng(0)
    for pixels in photographs:
        stored = jpeg(pixels, subsampling=SUBSAMPLING[subsampling])
        image = Image.fromarray(decoded(stored))
        crops = []
        for low, high in [(250, 427), (60, 200), (20, 60)] * 4:
            h, w = random.integers(low, high, 2)
            crops.append([random.integers(0, 428 - h), random.integers(0, 641 - w), h, w, random.integers(0, 2)])
        sizes = [224, 96, 96] * 4
        for view, box, size in zip(
            views_of(stored, JPEG, pixels.shape, crops, sizes, cubic=cubic), crops, sizes, strict=True
        ):
            assert psnr(view, resize_view(image, box, size, cubic)) > 40


@CUBIC
@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_decoding_is_within_38_db_of_pillow(photographs, subsampling, scale, cubic):
    for pixels in photographs:
        pixels = pixels[: 427 - scale, : 640 - scale]  # sizes that the scale does not divide
        stored = jpeg(pixels, subsampling=SUBSAMPLING[subsampling])
        image = Image.fromarray(decoded(stored))
        height, width = pixels.shape[:2]
        for box in ([0, 0, height, width, 0], [11, 101, 401, 333, 1], [107, 101, 301, 311, 0]):
            size = min(box[2:4]) // (decode.MARGIN * scale)
            scales = decode.decode_scales(np.array([[box]]), np.array([size]))
            assert scales.tolist() == [scale]
            (view,) = views_of(stored, JPEG, pixels.shape, [box], [size], scale, cubic)
            assert psnr(view, resize_view(image, box, size, cubic)) > 38


def test_the_decode_scale_suits_the_most_demanding_view():
    def scale(*crops_and_sizes) -> int:
        crops, sizes = zip(*crops_and_sizes, strict=True)
        return int(decode.decode_scales(np.array([[[0, 0, h, w, 0] for h, w in crops]]), np.array(sizes))[0])

    assert scale(((600, 700), 100)) == 2
    assert scale(((599, 700), 100)) == 1
    assert scale(((4000, 5000), 100)) == 8
    assert scale(((4000, 5000), 100), ((1200, 1300), 100)) == 4
    assert scale(((4000, 5000), 100), ((100, 100), 100)) == 1


# --- what is left to Pillow ---


def test_what_libjpeg_turbo_complains_about_is_left_to_pillow():
    pixels = photograph(3)
    whole = jpeg(pixels)
    stray = np.concatenate(
        [whole[:-2], np.zeros(40, np.uint8), whole[-2:]]
    )  # bytes between the data and its end marker
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    for stored, shape in (
        (whole[: len(whole) // 2], (48, 64)),
        (np.zeros(100, np.uint8), (48, 64)),
        (whole, (64, 48)),
        (stray, (48, 64)),
        (np.frombuffer(cmyk.getvalue(), np.uint8), (48, 64)),
        (jpeg(pixels[..., 0]), (48, 64)),
        (jpeg(pixels, keep_rgb=True), (48, 64)),
    ):
        *_, layout = planes_of(stored, JPEG, *shape)
        assert layout[0, KIND] == UNDECODED


def test_split_pixels_is_what_an_uncompressed_image_becomes():
    pixels = photograph(4, 13, 17)
    planes, _, layout = planes_of(pixels.ravel(), RAW, 13, 17)
    again, row = np.full_like(planes, 255), np.empty(6, np.int32)
    decode.split_pixels(pixels, again, row)
    np.testing.assert_array_equal(again, planes)
    np.testing.assert_array_equal(row, layout[0])
    np.testing.assert_array_equal(planes[: 3 * 13 * 17].reshape(3, 13, 17).transpose(1, 2, 0), pixels)
