"""rob eval detect: a student becomes a detector, on both layouts; AP is pycocotools'; what is refused."""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rob import cli
from rob.common.errors import MisuseError
from rob.student_train import epochs
from rob.student_train.checkpoint import export_weights, hash_student
from rob.student_train.evaluate.detection import detect as stage
from rob.student_train.evaluate.detection.data import DetectionTensors, open_detection
from rob.student_train.evaluate.detection.detect import DetectConfig, detect
from rob.student_train.evaluate.detection.model import Pyramid, build_detector
from rob.student_train.evaluate.detection.score import average_precision, precision_by_class
from rob.student_train.finetune.tuned import load_tuned
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.shapes import coco_shapes, voc_shapes


def make_run(folder: Path, name: str = "test_resnet", size: int = 64, small_images: bool = False) -> Path:
    config = StudentConfig(name, size, small_images)
    torch.manual_seed(0)
    export_weights(build_student(config), describe_student(config), folder / "student.safetensors")
    return folder


def rob(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rob", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


# ==== the whole command ====


@pytest.mark.slow
def test_shapes_with_masks_are_found_and_ap_is_that_of_pycocotools(tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "shapes", make_run(tmp_path / "run")
    coco_shapes(data, "train", 16, seed=1)
    coco_shapes(data, "test", 4, seed=2)
    small = ("--side", 64, "--channels", 32, "--epochs", 4, "--batch-size", 2, "--lr", 2e-3, "--device", "cpu")
    assert rob(monkeypatch, "eval", "detect", run, data, *small) == 0
    result = json.loads((run / "eval" / "detect.json").read_text())
    assert result["box"]["ap50"] > 60
    assert result["mask"]["ap50"] > 60
    assert f"{result['mask']['ap75']:.2f}" in capsys.readouterr().out

    truth = COCO(str(data / "annotations" / "instances_test.json"))
    found = truth.loadRes(str(run / "eval" / "detections" / "detect.json"))
    for kind, scores in (("bbox", result["box"]), ("segm", result["mask"])):
        by_hand = COCOeval(truth, found, kind)
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
        assert [scores["ap"], scores["ap50"], scores["ap75"]] == pytest.approx((100 * by_hand.stats[:3]).tolist())
    assert set(result["per_class"]) == {"disc", "square"}
    assert np.mean(list(result["per_class"].values())) == pytest.approx(result["box"]["ap"])


def test_voc_lists_random_weights_and_resuming(tmp_path, monkeypatch):
    data, run = voc_shapes(tmp_path / "voc", {"train": 6, "val": 2, "test": 3}), make_run(tmp_path / "run")
    arguments = ("eval", "detect", run, data, "--side", 64, "--channels", 16, "--epochs", 2, "--device", "cpu")
    assert rob(monkeypatch, *arguments, "--init", "random") == 0
    whole = json.loads((run / "eval" / "detect-random.json").read_text())
    assert (whole["num_train"], whole["num_test"], whole["mask"]) == (6, 3, None)
    assert whole["weights"] == hash_student(run)  # by which rob compare knows whose it is
    found = (run / "eval" / "detections" / "detect-random.json").read_bytes()
    save = epochs.save_checkpoint

    def killed(*rest):
        save(*rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(epochs, "save_checkpoint", killed)
    assert rob(monkeypatch, *arguments, "--init", "random", "--overwrite") == 130
    monkeypatch.setattr(epochs, "save_checkpoint", save)
    boxes = data / "Annotations" / "000.xml"
    right = boxes.read_text()
    boxes.write_text(re.sub(r"<xmin>\d+", "<xmin>1", right))
    assert rob(monkeypatch, *arguments, "--init", "random") == 2  # half of the training would be on other boxes
    boxes.write_text(right)
    trained = []
    batches = stage._training_batches
    monkeypatch.setattr(stage, "_training_batches", lambda *rest: trained.append(rest[-1]) or batches(*rest))
    assert rob(monkeypatch, *arguments, "--init", "random") == 0
    assert trained == [1]
    assert json.loads((run / "eval" / "detect-random.json").read_text()) == whole
    assert (run / "eval" / "detections" / "detect-random.json").read_bytes() == found
    assert not list((run / "eval").glob("*.pt"))
    kept = (run / "eval" / "detect-random.safetensors").read_bytes()
    assert rob(monkeypatch, *arguments, "--init", "random") == 2, "a detector is not written over"
    assert rob(monkeypatch, *arguments, "--val", "val", "--test", "val") == 2
    assert (run / "eval" / "detect-random.safetensors").read_bytes() == kept
    # The detector is kept, and finds the same anew.
    detector, tuned = load_tuned(run / "eval" / "detect-random.safetensors")
    assert (tuned.task, tuned.classes) == ("detect", ("disc", "square"))
    again = stage.find(detector, open_detection(data, "test"), False, torch.device("cpu"), stage.DetectProgress())
    assert [found["bbox"] for found in again] == [found["bbox"] for found in json.loads(found)]


def test_the_epoch_that_is_best_on_val_is_kept(tmp_path, monkeypatch):
    data, run = voc_shapes(tmp_path / "voc", {"train": 4, "val": 2, "test": 1}), make_run(tmp_path / "run")
    scores, measured = [50.0, 10.0], []

    def score(detector, on, *rest):
        measured.append((len(on.images), copy.deepcopy(detector.state_dict())))
        return scores[len(measured) - 1]

    monkeypatch.setattr(stage, "_box_ap", score)
    words = ("--side", 64, "--channels", 16, "--epochs", 2, "--device", "cpu", "--val", "val")
    assert rob(monkeypatch, "eval", "detect", run, data, *words) == 0
    assert [images for images, _ in measured] == [2, 2]
    kept = load_tuned(run / "eval" / "detect.safetensors")[0].state_dict()
    first, last = (state for _, state in measured)
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in last.items())


def test_the_students_weights_are_where_training_starts(tmp_path, monkeypatch):
    run, seen = make_run(tmp_path / "run"), {}
    data = voc_shapes(tmp_path / "voc", {"train": 2, "test": 1})

    def look(detector, *rest):
        seen[rest[2].init] = copy.deepcopy(detector.backbone.backbone.state_dict())

    monkeypatch.setattr(stage, "fit", look)
    for init in ("student", "random"):
        detect(DetectConfig(run, data, init=init, side=64, channels=16, seed=1, device="cpu"))
    torch.manual_seed(0)
    trained = build_student(StudentConfig("test_resnet", 64)).state_dict()
    torch.testing.assert_close(dict(seen["student"]), dict(trained))
    assert not torch.equal(seen["random"]["conv1.0.weight"], trained["conv1.0.weight"])


# ==== parts ====


@pytest.mark.parametrize(
    ("name", "size", "small", "strides"),
    [
        ("test_resnet", 64, False, [4, 8, 16, 32, 64]),
        ("resnet18", 32, True, [4, 8, 16, 32, 64]),
        ("mobilenetv2_050", 32, True, [4, 8, 16, 32, 64]),
        ("test_vit", 160, False, [4, 8, 16, 32, 64]),
        ("test_vit", 32, True, [4, 8, 16, 32, 64]),
    ],
)
def test_levels_are_of_the_strides_they_say(name, size, small, strides):
    pyramid = Pyramid(build_student(StudentConfig(name, size, small)), channels=8).eval()
    assert pyramid.strides == strides
    levels = pyramid(torch.randn(1, 3, 64, 128))
    assert list(levels) == ["0", "1", "2", "3", "4"]
    assert [tuple(level.shape) for level in levels.values()] == [(1, 8, 64 // s, 128 // s) for s in strides]
    if small:  # what a small stem gives stops at stride 8, or at a patch of 4
        assert pyramid.num_pooled_from == (4 if "vit" in name else 2)


def test_a_batch_is_padded_to_whole_patches():
    config = StudentConfig("vit_tiny_patch16_224", 56)
    info = describe_student(config)
    detector = build_detector(build_student(config), info, 2, masks=False, side=72, channels=8).eval()
    with torch.no_grad():
        detector([torch.rand(3, 50, 70), torch.rand(3, 81, 40)])


def test_masks_and_boxes_follow_the_flip(tmp_path):
    coco_shapes(tmp_path, "train", 1, seed=1)
    data = open_detection(tmp_path, "train")
    plain, mirrored = (DetectionTensors(data, True, torch.tensor([flip]))[0] for flip in (False, True))
    torch.testing.assert_close(mirrored[0], plain[0].flip(-1))
    for image, target in (plain, mirrored):
        for box, mask, label in zip(target["boxes"].int().tolist(), target["masks"], target["labels"], strict=True):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert abs(int(rows[0]) - box[1]) <= 1
            assert abs(int(columns[-1]) + 1 - box[2]) <= 1
            colour = image[:, mask.bool()].median(1).values.argmax()
            assert data.classes[label - 1] == {0: "disc", 2: "square"}[int(colour)]


def test_voc_counts_from_one(tmp_path):
    data = open_detection(voc_shapes(tmp_path / "voc", {"train": 1}), "train")
    thing = data.annotations[data.images[0]["id"]][1]
    x, y, width, height = (int(v) for v in thing["bbox"])
    with Image.open(data.folder / data.images[0]["file_name"]) as image:
        blue = np.asarray(image).astype(int)[..., 2] > 180
    assert data.categories[thing["category_id"]] == "square"
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == pytest.approx([x, y, x + width, y + height], abs=1)


def test_average_precision_of_known_detections():
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
            for n in (1, 2)
        ],
    }
    exact = [{"image_id": n, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9} for n in (1, 2)]
    assert average_precision(truth, exact).ap == pytest.approx(100)
    half = average_precision(truth, exact[:1])
    assert half.ap == pytest.approx(100 * 51 / 101)  # of 101 points of recall, 0 ... 0.50
    shifted = [{**d, "bbox": [10, 10, 20, 32]} for d in exact]  # IoU 20 / 32 = 0.625: right at 0.50, 0.55 and 0.60
    scores = average_precision(truth, shifted)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((30, 100, 0))
    assert average_precision(truth, []).ap == 0
    assert average_precision({**truth, "annotations": []}, exact).ap is None

    # A class as if there were no other: "b" is not found, "c" found where it is not, "d" neither there nor found.
    truth["categories"] += [{"id": 2, "name": "b"}, {"id": 4, "name": "c"}, {"id": 7, "name": "d"}]
    truth["annotations"].append({**truth["annotations"][0], "id": 3, "category_id": 2})
    found = [exact[0], {**exact[0], "category_id": 4}]
    score, by_class = precision_by_class(truth, found)
    assert by_class == {"a": pytest.approx(100 * 51 / 101), "b": 0, "c": None, "d": None}
    assert score.ap == pytest.approx(100 * 51 / 101 / 2)
    assert precision_by_class(truth, [])[1] == {"a": 0, "b": 0, "c": None, "d": None}


# ==== what is refused ====


def damaged(tmp_path: Path, change) -> Path:
    content = coco_shapes(tmp_path / "damaged", "train", 2, seed=1)
    change(content)
    (tmp_path / "damaged" / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path / "damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(bbox=[50, 5, 30, 20]), r"a box of 000\.png lies outside it: x 50 to 80"),
        (
            lambda c: c["annotations"][1].update(bbox=[5, -9, 30, 20]),
            r"a box of 000\.png lies outside it: .*y -9 to 11",
        ),
        (lambda c: c["annotations"][0].update(category_id=3), "object 1 is of class 3, which is not there"),
        (lambda c: c["annotations"][0].update(image_id=3), "object 1 is of image 3, which is not there"),
        (lambda c: c["images"][1].update(file_name="no.png"), r"names no\.png, and there is no such file"),
        (lambda c: c.update(images=[], annotations=[]), r"instances_train\.json has no image"),
        (lambda c: c.pop("categories"), r"instances_train\.json is not an annotation file of COCO"),
    ],
)
def test_annotations_that_cannot_be(tmp_path, change, message):
    with pytest.raises(MisuseError, match=message):
        open_detection(damaged(tmp_path, change), "train")


def test_a_box_rounded_over_the_edge_is_cut(tmp_path):
    data = open_detection(damaged(tmp_path, lambda c: c["annotations"][0].update(bbox=[-0.6, 50, 20, 14.5])), "train")
    assert data.annotations[10][0]["bbox"] == pytest.approx([0, 50, 19.4, 14])


def test_an_image_of_another_size(tmp_path):
    data = open_detection(damaged(tmp_path, lambda c: c["images"][0].update(width=65)), "train")
    with pytest.raises(MisuseError, match="has 64 x 64 pixels, its annotation says 65 x 64"):
        DetectionTensors(data, False)[0]


def test_layouts_splits_and_classes(tmp_path):
    with pytest.raises(MisuseError, match="no such folder"):
        open_detection(tmp_path / "nowhere", "train")
    with pytest.raises(MisuseError, match=r"neither layout that rob reads\. VOC: ImageSets"):
        open_detection(tmp_path, "train")
    voc = voc_shapes(tmp_path / "voc", {"train": 1, "test": 1})
    with pytest.raises(MisuseError, match="no split 'val': there are test, train"):
        open_detection(voc, "val")
    xml = voc / "Annotations" / "001.xml"
    xml.write_text(xml.read_text().replace("square", "ring"))
    with pytest.raises(MisuseError, match="class 'ring' of test is not in train"):
        open_detection(voc, "test").with_classes_of(open_detection(voc, "train"))
    xml.write_text(xml.read_text().replace("<xmax>", "<x>").replace("</xmax>", "</x>"))
    with pytest.raises(MisuseError, match=r"001\.xml is not an annotation file of VOC: no bndbox/xmax in <object>"):
        open_detection(voc, "test")
    xml.unlink()
    with pytest.raises(MisuseError, match=r"names 001, and .*001\.xml is missing"):
        open_detection(voc, "test")


def test_students_and_settings_that_do_not_fit(tmp_path):
    voc = voc_shapes(tmp_path / "voc", {"train": 1, "test": 1})
    fixed = make_run(tmp_path / "fixed", "swin_tiny_patch4_window7_224", 224)
    with pytest.raises(MisuseError, match=r"the student cannot take images of other sizes than it was made for: .*224"):
        detect(DetectConfig(fixed, voc, side=64, device="cpu"))
    run = make_run(tmp_path / "run")
    with pytest.raises(MisuseError, match="unknown init 'randomly': did you mean random"):
        detect(DetectConfig(run, voc, init="randomly"))
    with pytest.raises(MisuseError, match="`epochs` is 0, expected at least 1"):
        detect(DetectConfig(run, voc, epochs=0))
    assert not re.search("eval", " ".join(map(str, run.iterdir())))
