"""What ``rob check`` says of images: those that are there twice, of one colour, small, or of few classes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rob.common.images.beton import Beton
from rob.common.look.duplicates import duplicates
from rob.common.look.image_check import check_images, check_leak, class_sizes
from rob.common.look.sheet import class_of
from rob.common.look.thumbnails import Thumbnails, perceptual_hashes
from support.packing import packed
from support.photographs import photograph


def save(folder, name, pixels, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def brighter(pixels):
    return (60 + pixels * 0.6).astype(np.uint8)


def enlarged(pixels):
    return np.asarray(Image.fromarray(pixels).resize((150, 110), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """12 photographs and what is wrong beside them, and a test set, some of whose images are among them."""
    folder = tmp_path_factory.mktemp("checked")
    train, test = folder / "train", folder / "test"
    for seed in range(12):
        save(train, f"a/{seed:02}.jpg", photograph(seed), quality=90)
    save(train, "b/blank.png", np.full((40, 40, 3), (10, 200, 30), np.uint8))
    save(train, "b/same.jpg", photograph(3), quality=90)  # the bytes of a/03.jpg under another class
    save(train, "b/worse.jpg", photograph(4), quality=40)
    save(train, "b/small.jpg", photograph(20, 20, 24), quality=90)
    save(test, "a/brighter.jpg", brighter(photograph(5)), quality=90)
    save(test, "a/enlarged.jpg", enlarged(photograph(6)), quality=90)
    save(test, "a/grey.jpg", np.asarray(Image.fromarray(photograph(7)).convert("L")), quality=90)
    save(test, "a/same.jpg", photograph(8), quality=90)
    save(test, "a/new.jpg", photograph(30), quality=90)
    save(test, "c/new.jpg", photograph(31), quality=90)
    return check_images(packed(train, folder / "packed_train")), check_images(packed(test, folder / "packed_test"))


def pairs(found, these, others):
    names = these.data.manifest.paths, others.data.manifest.paths
    return {names[0][i]: (names[1][j], same) for i, j, same in zip(found.rows, found.of, found.exact, strict=True)}


def test_images_that_are_there_twice_are_found_in_one_set(checked):
    train, test = checked
    expected = {"b/same.jpg": ("a/03.jpg", True), "b/worse.jpg": ("a/04.jpg", False)}
    assert pairs(train.repeated, train, train) == expected
    assert not pairs(test.repeated, test, test)


def test_images_that_were_trained_on_are_found_whatever_size_brightness_and_colour_they_have(checked):
    train, test = checked
    leak = check_leak(test, train)
    assert pairs(leak.shared, test, train) == {
        "a/brighter.jpg": ("a/05.jpg", False),
        "a/enlarged.jpg": ("a/06.jpg", False),
        "a/grey.jpg": ("a/07.jpg", False),
        "a/same.jpg": ("a/08.jpg", True),
    }
    assert [entry["alike"] == "exact" for entry in leak.to_dict()["shared"]] == [False, False, False, True]


def test_what_does_harm_is_said_with_the_paths_of_the_images(checked):
    train, test = checked
    said = "\n".join((*train.warnings(image_size=30), *check_leak(test, train).warnings()))
    for sentence in (
        "1 image of one colour, which teach nothing: b/blank.png",
        "1 image with a side below 30 px, which crops of that size enlarge: b/small.jpg",
        "1 of 16 images are there more than once, byte for byte, 1 of them under another class: b/same.jpg (a/03.jpg)",
        "1 of 2 classes have fewer than 10 images: b",
        "1 of 2 classes are not in ",
    ):
        assert sentence in said
    assert train.seen.blank == (12,)


def test_one_class_is_nothing_to_measure_on(tmp_path):
    for seed in range(2):
        save(tmp_path / "images", f"only/{seed}.png", photograph(seed))
    found = check_images(packed(tmp_path / "images", tmp_path / "out"))
    assert any("all images are of one class, only" in warning for warning in found.warnings(8))


def test_an_image_that_no_decoder_reads_is_damaged_and_like_no_other(checked, monkeypatch):
    train, _ = checked
    whole = Beton.encoded
    monkeypatch.setattr(Beton, "is_whole", lambda data, image_id: True)
    monkeypatch.setattr(
        Beton, "encoded", lambda data, i: whole(data, i)[: 300 if i in (3, 13) else None]
    )  # a/03.jpg and its copy, cut
    found = check_images(train.data)
    assert found.seen.damaged == (3, 13)
    assert "image 3 is damaged (a/03.jpg)" in found.damaged()[0]
    assert list(pairs(found.repeated, found, found)) == ["b/worse.jpg"]


def test_hashes_that_differ_in_seven_bits_are_all_found():
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**63, 900, dtype=np.uint64)
    flips = np.array([sum(1 << int(bit) for bit in draw.choice(64, 7, replace=False)) for _ in range(300)], np.uint64)
    hashes[600:] = hashes[:300] ^ flips
    grey = draw.integers(0, 256, (900, 16, 16), dtype=np.uint8)
    grey[600:] = grey[:300]
    digests = np.arange(900, dtype=np.uint64)
    seen = Thumbnails(None, digests, hashes, grey, (), ())  # type: ignore[arg-type]
    found = duplicates(seen)
    assert found.rows.tolist() == list(range(600, 900))
    assert found.of.tolist() == list(range(300))
    others = replace(seen, digests=digests + np.uint64(900), grey=draw.integers(0, 256, grey.shape, dtype=np.uint8))
    assert not len(duplicates(seen, others).rows)  # hashes alone do not tell


def test_a_hash_knows_no_brightness_and_no_contrast():
    pictures = np.random.default_rng(0).uniform(0, 255, (50, 32, 32))
    assert (perceptual_hashes(pictures) == perceptual_hashes(20 + 0.5 * pictures)).all()


def test_images_without_a_label_among_others_are_of_no_class(checked, tmp_path):
    train, _ = checked
    labels = np.array(train.data.labels)
    data = Beton(train.data.path)
    data.labels = np.where(np.arange(len(labels)) < 2, -1, labels)
    assert class_sizes(data) == {"a": 10, "b": 4}
    assert (class_of(data, 0), class_of(data, 5)) == (None, "a")
    found = replace(train, seen=replace(train.seen, data=data))
    assert "1 of them under another class" in "\n".join(found.warnings(image_size=8))
    data.labels[:] = -1
    assert "under another class" not in "\n".join(found.warnings(image_size=8))
