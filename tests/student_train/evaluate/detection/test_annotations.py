"""Annotation files as people have them, and as somebody might make them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from rob.common.errors import FailureError, MisuseError
from rob.common.images.pack import PackConfig, encode_image
from rob.student_train.evaluate.detection.data import DetectionData, DetectionTensors, open_detection
from rob.student_train.evaluate.detection.masks import UnusableError, checked_segmentation, draw_mask
from rob.student_train.evaluate.detection.score import average_precision
from support.shapes import coco_shapes, voc_shapes


def opened(tmp_path: Path, change) -> DetectionData:
    content = coco_shapes(tmp_path / "data", "train", 3, seed=1)
    change(content)
    (tmp_path / "data" / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return open_detection(tmp_path / "data", "train")


def perfect(data: DetectionData) -> list[dict[str, Any]]:
    """Detections that find every object."""
    things = [thing for of_image in data.annotations.values() for thing in of_image]
    return [{**{n: t[n] for n in ("image_id", "category_id", "bbox")}, "score": 0.9} for t in things]


def renumber(content: dict[str, Any], ids) -> None:
    for thing, number in zip(content["annotations"], ids, strict=False):
        thing["id"] = number


@pytest.mark.parametrize(
    "ids", [range(100), [0, 1] * 50, ["a", "b"] * 50], ids=["from 0", "again in each image", "strings"]
)
def test_the_files_own_ids_do_not_change_average_precision(tmp_path, ids):
    """pycocotools takes an object numbered 0 for none, and counts one object for many of one number."""
    data = opened(tmp_path, lambda c: renumber(c, ids))
    assert average_precision(data.to_coco(), perfect(data)).ap == pytest.approx(100)


@pytest.mark.parametrize("field", ["id", "iscrowd", "area", "segmentation"])
@pytest.mark.parametrize("value", ["missing", None])
def test_what_may_be_missing_has_a_default(tmp_path, field, value):
    def change(content):
        for thing in content["annotations"]:
            thing.pop(field, None)
            if value != "missing":
                thing[field] = value

    data = opened(tmp_path, change)
    assert data.has_masks == (field != "segmentation")
    assert average_precision(data.to_coco(), perfect(data)).ap == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][1].pop("bbox"), r"it lacks annotations\.1\.bbox"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotations\.1\.bbox is \[1, 2, 3\]"),
        (lambda c: c["annotations"][1].update(bbox=None), r"annotations\.1\.bbox is None"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), "lies outside"),
        (lambda c: c["annotations"][1].update(category_id="1"), r"annotations\.1\.category_id is '1'"),
        (lambda c: c["categories"][0].pop("name"), r"lacks categories\.0\.name"),
        (lambda c: c["images"][0].pop("width"), r"lacks images\.0\.width"),
        (lambda c: c["images"][0].update(id="7"), r"images\.0\.id is '7'"),
        (lambda c: c["images"][0].update(file_name=7), r"images\.0\.file_name is 7"),
        (lambda c: c.update(images={}), r"images is \{\}"),
        (lambda c: c["images"].append(c["images"][0]), r"has two of image 10: give each an id of its own"),
        (lambda c: c["categories"].append(c["categories"][0]), "has two of class"),
        (lambda c: c["categories"].append({**c["categories"][0], "id": 99}), "has two classes of one name"),
        (lambda c: c["images"][0].update(width=10**9), "is said to have 1000000000 x 64 pixels, which cannot be"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_trained(tmp_path, change, words):
    with pytest.raises(MisuseError, match=rf"instances_train\.json.*{words}"):
        opened(tmp_path, change)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_images_outside_of_the_folder_are_refused(tmp_path, name):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    with pytest.raises(MisuseError, match="which is outside of"):
        opened(tmp_path, lambda c: c["images"][0].update(file_name=name))


@pytest.mark.parametrize(
    "lengths",
    [
        {"size": [100_000, 100_000], "counts": [10**10]},
        {"size": [64, 63], "counts": [64 * 63]},
        {"size": [64, 64], "counts": [64 * 64 + 1]},
        {"size": [64, 64], "counts": [-5, 64 * 64 + 5]},
        {"size": [64, 64], "counts": "oooooooo"},
        {"size": [64, 64], "counts": "0" * 9},
        {"size": [64, 64], "counts": {}},
        {"size": [64, 64]},
        "RLE",
        [["a", "b"]],
        [[1, 2, 3, 4, 5, 1e300]],
    ],
    ids=str,
)
def test_run_lengths_that_do_not_fit_their_image_name_the_object(tmp_path, lengths):
    with pytest.raises(MisuseError, match="object 2 has"):
        opened(tmp_path, lambda c: c["annotations"][1].update(segmentation=lengths))


def test_polygons_that_draw_nothing_leave_their_object_out_and_are_counted(tmp_path):
    before = opened(tmp_path, lambda c: None)
    for bad in ([], [[]], [[1, 2, 3, 4]]):
        shutil.rmtree(tmp_path / "data")
        data = opened(tmp_path, lambda c, bad=bad: c["annotations"][1].update(segmentation=bad))
        assert data.has_masks
        assert sum(map(len, data.annotations.values())) == sum(map(len, before.annotations.values())) - 1
        assert "1 objects are left out" in data.left_out[0]


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_packed_run_lengths_are_those_of_pycocotools(pixels):
    mask = np.asfortranarray(np.array(pixels, np.uint8).reshape(3, 4))
    packed: Any = coco_mask.encode(mask)
    told = {"size": packed["size"], "counts": packed["counts"].decode()}
    assert np.array_equal(draw_mask(checked_segmentation(told, 3, 4), 3, 4), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_no_packed_run_lengths_leave_their_image(counts):
    """pycocotools would write behind it."""
    try:
        told = checked_segmentation({"size": [3, 4], "counts": counts}, 3, 4)
    except UnusableError:
        return
    assert draw_mask(told, 3, 4).shape == (3, 4)


# ---- pixels ----


def with_image(tmp_path: Path, image: Image.Image, **options: Any) -> np.ndarray:
    """What detection reads of an image, (H, W, 3) uint8."""
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    content = coco_shapes(tmp_path / "data", "train", 1, seed=1)
    path = tmp_path / "data" / "train" / content["images"][0]["file_name"]
    image.save(path, "JPEG" if "exif" in options else "PNG", **options)
    pixels, _ = DetectionTensors(open_detection(tmp_path / "data", "train"), masks=False)[0]
    return (255 * pixels).round().byte().permute(1, 2, 0).numpy()


def test_pixels_are_those_that_pack_reads(tmp_path):
    grey = Image.fromarray(np.full((64, 64), 20_000, np.uint16))
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert np.unique(with_image(tmp_path, grey)).tolist() == [78]
    assert np.unique(with_image(tmp_path, clear)).tolist() == [255]


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_is_turned_as_pack_turns_it(tmp_path, orientation):
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:20] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = with_image(tmp_path, Image.fromarray(ramp), exif=exif, quality=95)
    path = next((tmp_path / "data" / "train").iterdir())
    stored = encode_image(path.read_bytes(), PackConfig("", tmp_path / "a.beton", raw=True))
    assert np.array_equal(found, np.frombuffer(stored.data, np.uint8).reshape(64, 64, 3))
    bright = found[-20:] if orientation == 3 else found[:, -20:]
    assert bright.mean() > 240


def test_test_images_are_looked_at_before_training(tmp_path):
    data = opened(tmp_path, lambda c: None)
    (data.folder / data.images[2]["file_name"]).write_bytes(b"broken")
    with pytest.raises(FailureError, match="cannot be read: not an image"):
        DetectionTensors(data, masks=False).check_sizes()


# ---- VOC ----


def renamed(
    tmp_path: Path, name: str, ending: str = ".jpg", line: str | None = None, told: str | None = None
) -> DetectionData:
    """A VOC folder of one image by another name."""
    folder = voc_shapes(tmp_path / "voc", {"train": 1})
    (image,) = (folder / "JPEGImages").iterdir()
    (xml,) = (folder / "Annotations").iterdir()
    image.rename(image.with_name(name + ending))
    text = (
        xml.read_text().replace("<annotation>", f"<annotation><filename>{told}</filename>") if told else xml.read_text()
    )
    xml.unlink()
    xml.with_name(f"{name}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text((name if line is None else line) + "\n", encoding="utf-8")
    return open_detection(folder, "train")


@pytest.mark.parametrize("name", ["my photo", "a  b c", "photo 1", "öl"])
def test_names_with_spaces_are_names(tmp_path, name):
    assert renamed(tmp_path, name).images[0]["file_name"] == f"{name}.jpg"


@pytest.mark.parametrize("flag", [" 1", " -1", "  0"])
def test_lists_of_one_class_name_images(tmp_path, flag):
    assert renamed(tmp_path, "my photo", line=f"my photo{flag}").images[0]["file_name"] == "my photo.jpg"


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".png", ".PNG"])
def test_any_ending_of_a_picture_is_found(tmp_path, ending):
    assert renamed(tmp_path, "000", ending).images[0]["file_name"] == f"000{ending}"


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    assert renamed(tmp_path, "000", line="\ufeff000").images[0]["file_name"] == "000.jpg"


def test_the_files_own_name_of_its_image_is_heeded(tmp_path):
    folder = voc_shapes(tmp_path / "voc", {"train": 1})
    (image,) = (folder / "JPEGImages").iterdir()
    (xml,) = (folder / "Annotations").iterdir()
    image.rename(image.with_name("else.jpg"))
    for told, expected in (("else.jpg", "else.jpg"), ("../../../secret.jpg", None), ("/etc/passwd", None)):
        xml.write_text(xml.read_text().replace("<annotation>", f"<annotation><filename>{told}</filename>", 1))
        if expected:
            assert open_detection(folder, "train").images[0]["file_name"] == expected
        else:
            with pytest.raises(MisuseError, match="there is no such file"):
                open_detection(folder, "train")


def test_a_list_cannot_lead_outside(tmp_path):
    with pytest.raises(MisuseError, match="which is outside of"):
        renamed(tmp_path, "000", line="../../secret")


def test_xml_that_grows_is_refused(tmp_path):
    folder = voc_shapes(tmp_path / "voc", {"train": 1})
    (xml,) = (folder / "Annotations").iterdir()
    entities = (
        '<!ENTITY a "'
        + "x" * 1000
        + '">'
        + "".join(f'<!ENTITY {n} "{f"&{p};" * 50}">' for p, n in zip("abcdef", "bcdefg", strict=True))
    )
    xml.write_text(f"<!DOCTYPE d [{entities}]><annotation><size>&g;</size></annotation>")
    with pytest.raises(MisuseError, match=r"is not an annotation file of VOC"):
        open_detection(folder, "train")
    xml.unlink()
    os.mkfifo(xml)
    with pytest.raises(MisuseError, match="not a regular file"):
        open_detection(folder, "train")
