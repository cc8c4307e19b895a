"""Masks of every layout become the same labels, and what cannot be is one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from rob.common.errors import MisuseError
from rob.student_train.evaluate.segmentation.data import IGNORED
from rob.student_train.evaluate.segmentation.layouts import VOC_NAMES, open_segmentation
from rob.student_train.evaluate.segmentation.score import Confusion
from support.shapes import coco_shapes, mask_shapes


def write_mask(path: Path, values: object, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata(np.asarray(values, np.uint8).ravel().tolist())
    image.save(path)


def write_picture(path: Path, width: int = 4, height: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def test_folders_of_masks_and_coco_polygons_of_the_same_pictures_say_the_same(tmp_path):
    folders = open_segmentation(mask_shapes(tmp_path / "folders", 3, seed=1))
    coco_shapes(tmp_path / "coco", "train", 3, seed=1)
    coco = open_segmentation(tmp_path / "coco" / "annotations" / "instances_train.json")
    assert folders.classes == ("nothing", "disc", "square")
    assert coco.classes == ("background", "disc", "square")
    for row in range(3):
        assert np.array_equal(folders.image(row), coco.image(row))
        drawn, polygons = folders.labels(row), coco.labels(row)
        assert set(np.unique(drawn)) == {0, 1, 2}
        assert (drawn != polygons).mean() < 0.03  # the outline itself, which the two draw differently
    assert np.array_equal(folders.counts(), sum(np.bincount(folders.labels(r).ravel(), minlength=3) for r in range(3)))


def test_voc_ignores_outlines_and_ade20k_what_is_nothing(tmp_path):
    values = [[0, 1, 20, 255], [0, 0, 1, 1]]
    write_picture(tmp_path / "voc/JPEGImages/a.jpg")
    write_mask(tmp_path / "voc/SegmentationClass/a.png", values, "P")
    part = tmp_path / "voc/ImageSets/Segmentation/train.txt"
    part.parent.mkdir(parents=True)
    part.write_text("a\n")
    voc = open_segmentation(part)
    assert voc.classes == VOC_NAMES
    assert voc.labels(0).tolist() == values

    write_picture(tmp_path / "ade/images/training/a.jpg")
    write_mask(tmp_path / "ade/annotations/training/a.png", [[0, 1, 150, 2], [0, 0, 1, 1]])
    ade = open_segmentation(tmp_path / "ade/images/training")
    assert ade.labels(0).tolist() == [[IGNORED, 0, 149, 1], [IGNORED, IGNORED, 0, 0]]
    assert len(ade.classes) == 150


def test_validation_is_counted_as_training_is_by_name_or_by_value(tmp_path):
    train = open_segmentation(mask_shapes(tmp_path / "train", 2, seed=1))
    other = mask_shapes(tmp_path / "val", 2, seed=2)
    (other / "classes.txt").write_text("nothing\nsquare\ndisc\n")  # the other way round
    val = open_segmentation(other)
    swapped = val.with_classes_of(train, train.counts()).labels(0)
    assert np.array_equal(swapped, np.array([0, 2, 1], np.uint8)[val.labels(0)])
    (other / "classes.txt").unlink()
    by_value = open_segmentation(other)
    assert by_value.classes == ("0", "1", "2")
    assert np.array_equal(by_value.with_classes_of(train, train.counts()).labels(0), val.labels(0))


def refused(path: Path) -> str:
    with pytest.raises(MisuseError) as error:
        open_segmentation(path).counts()
    return str(error.value)


def test_masks_that_cannot_be_are_refused(tmp_path):
    folder = mask_shapes(tmp_path / "set", 1, seed=1)
    mask = folder / "masks" / "000.png"
    whole = mask.read_bytes()
    Image.new("L", (32, 64)).save(mask)
    assert f"{mask} is of 32 x 64 pixels, and {folder / 'images' / '000.png'} has 64 x 64" in refused(folder)
    Image.new("L", (64, 64), 7).save(mask)
    assert f"{mask} has pixels of 7, and {folder / 'classes.txt'} knows 0 to 2" in refused(folder)
    Image.new("RGB", (64, 64)).save(mask)
    assert "mode RGB" in refused(folder)
    Image.new("L", (64, 64), IGNORED).save(mask)
    assert f"{folder} has no labels" in refused(folder)
    mask.unlink()
    assert f"000.png has no mask: there is no {mask}" in refused(folder)
    mask.write_bytes(whole)
    (folder / "classes.txt").write_text("a\na\n")
    assert "is no list of classes" in refused(folder)
    assert "no such folder" in refused(tmp_path / "none")
    assert "has no layout that rob reads" in refused(tmp_path)
    coco_shapes(tmp_path / "boxes", "train", 1, seed=1, masks=False)
    assert "objects without polygons" in refused(tmp_path / "boxes" / "annotations" / "instances_train.json")


def test_a_class_that_only_validation_has_is_refused(tmp_path):
    train_folder = mask_shapes(tmp_path / "train", 1, seed=1)
    mask = train_folder / "masks" / "000.png"
    values = np.array(Image.open(mask))
    values[values == 2] = 0
    Image.fromarray(values).save(mask)
    train = open_segmentation(train_folder)
    val = open_segmentation(mask_shapes(tmp_path / "val", 1, seed=2))
    with pytest.raises(MisuseError, match=rf"class 'square' of {tmp_path}/val has no pixel in {tmp_path}/train"):
        val.with_classes_of(train, train.counts())


def drawn_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found, labels = (torch.randint(0, 4, (3, 16, 16), generator=generator) for _ in range(2))
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    return found, labels


def test_mean_iou_is_that_of_scikit_learn():
    found, labels = drawn_pair()
    confusion = Confusion(5)  # the fifth class is nowhere
    for one, truth in zip(found, labels, strict=True):
        confusion.add(one, truth)
    score = confusion.score("abcde")
    kept = labels != IGNORED
    expected = 100 * jaccard_score(labels[kept], found[kept], average=None)
    assert list(score.iou.values())[:4] == pytest.approx(expected.tolist())
    assert score.iou["e"] is None
    assert score.miou == pytest.approx(expected.mean())
    assert score.pixel_accuracy == pytest.approx(100 * (found[kept] == labels[kept]).double().mean().item())
