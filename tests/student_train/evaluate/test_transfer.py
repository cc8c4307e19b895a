"""rob eval transfer: each data set from a small folder laid out as the real one; VTAB's labels; what is refused."""

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, places365

from rob import cli
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.student_train.checkpoint import export_weights
from rob.student_train.evaluate.transfer import count_label, distance_label, open_task, packed_task
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.photographs import photograph


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed, 24, 32)).save(path)


def labels_of(source) -> dict[str, str]:
    """Path -> class name."""
    return {path: source.classes[source.read(path)[1]] for path in source.paths}


# ==== layouts ====


@pytest.mark.parametrize(("name", "class_", "per_file"), [("cifar10", CIFAR10, 4), ("cifar100", CIFAR100, 10)])
def test_cifar(tmp_path, monkeypatch, name, class_, per_file):
    folder = tmp_path / class_.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    pixels = {}
    for number, (file, _) in enumerate((*class_.train_list, *class_.test_list)):
        pixels[file] = np.random.default_rng(number).integers(0, 256, (per_file, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels[file], key: [i % 2 for i in range(per_file)]}))
    meta = {class_.meta["key"]: ["ape", "bee"]}
    (folder / class_.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # of the real files' sums
    train, test = open_task(name, tmp_path)
    assert (len(train.paths), len(test.paths)) == (per_file * len(class_.train_list), per_file)
    assert labels_of(test) == {f"test/{i}": ("ape", "bee")[i % 2] for i in range(per_file)}
    image, _ = train.read(train.paths[1])
    expected = pixels[class_.train_list[0][0]][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("mini", [False, True])
def test_inaturalist_2021(tmp_path, mini):
    kinds = ("00000_Animalia_Chordata_Aves_A_B_C_rook", "00001_Plantae_X_Y_A_B_C_rose")
    for part, n in (("2021_train_mini" if mini else "2021_train", 3), ("2021_valid", 1)):
        for kind in kinds:
            for row in range(n):
                save_image(tmp_path / part / kind / f"{row}.jpg", row)
    train, test = open_task("inaturalist2021-mini" if mini else "inaturalist2021", tmp_path)
    assert labels_of(train) == {f"{kind}/{row}.jpg": kind for kind in kinds for row in range(3)}
    assert labels_of(test) == {f"{kind}/0.jpg": kind for kind in kinds}


@pytest.mark.parametrize("year", ["2018", "2019"])
def test_inaturalist_before_2021_is_split_by_its_annotations(tmp_path, year):
    files = [f"{kind}/{row}.jpg" for kind in ("Aves/1", "Plantae/0") for row in range(3)]
    for seed, file in enumerate(files):
        save_image(tmp_path / year / file, seed)
    parts = {"train": [f for f in files if "/2." not in f], "val": [f for f in files if "/2." in f]}
    for part, chosen in parts.items():
        images = [{"file_name": f"train_val{year}/{file}"} for file in chosen]
        (tmp_path / f"{part}{year}.json").write_text(json.dumps({"images": images}))
    train, test = open_task(f"inaturalist{year}", tmp_path)
    assert labels_of(train) == {file: file.rpartition("/")[0] for file in parts["train"]}
    assert labels_of(test) == {"Aves/1/2.jpg": "Aves/1", "Plantae/0/2.jpg": "Plantae/0"}


def test_places(tmp_path, monkeypatch):
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    (tmp_path / "places365_train_standard.txt").write_text("/a/airfield/1.jpg 0\n/a/alley/2.jpg 1\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_1.jpg 1\n")
    for seed, file in enumerate(("data_256_standard/a/airfield/1.jpg", "data_256_standard/a/alley/2.jpg")):
        save_image(tmp_path / file, seed)
    save_image(tmp_path / "val_256" / "Places365_val_1.jpg", 3)
    monkeypatch.setattr(places365, "check_integrity", lambda file, md5: Path(file).exists())
    train, test = open_task("places365", tmp_path)
    assert labels_of(train) == {"a/airfield/1.jpg": "/a/airfield", "a/alley/2.jpg": "/a/alley"}
    assert labels_of(test) == {"Places365_val_1.jpg": "/a/alley"}


def clevr(root: Path) -> None:
    folder = root / "clevr" / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for split, depths in (("train", [[12, 8.2, 11], [9.9, 10.4, 15, 11]]), ("val", [[7.5, 9, 10, 11]])):
        scenes = []
        for row, of_scene in enumerate(depths):
            save_image(folder / "images" / split / f"CLEVR_{split}_{row:06}.png", row)
            objects = [{"pixel_coords": [100, 50, depth]} for depth in of_scene]
            scenes.append({"image_filename": f"CLEVR_{split}_{row:06}.png", "objects": objects})
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def test_clevr(tmp_path):
    clevr(tmp_path)
    train, test = open_task("clevr-count", tmp_path)
    assert list(labels_of(train).values()) == ["3", "4"]
    assert labels_of(test) == {"CLEVR_val_000000.png": "4"}
    assert train.classes == test.classes == ("3", "4", "5", "6", "7", "8", "9", "10")
    train, test = open_task("clevr-dist", tmp_path)
    assert list(labels_of(train).values()) == ["8 to 8.5", "9.5 to 10"]
    assert labels_of(test) == {"CLEVR_val_000000.png": "0 to 8"}


@pytest.mark.parametrize("content", ["[]", "{", '{"scenes": {}}', '{"scenes": [{"image_filename": 3, "objects": []}]}'])
def test_scenes_of_another_form_are_one_sentence(tmp_path, content):
    clevr(tmp_path)
    (tmp_path / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json").write_text(content)
    with pytest.raises(MisuseError, match=r"CLEVR_val_scenes\.json is not a scene file of Clevr: it "):
        open_task("clevr-count", tmp_path)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([{"file_name": "train_val2018/../../etc/passwd"}], r"names '\.\./\.\./etc/passwd', which is of no category"),
        ([{"file_name": "train_val2018/Fungi/9/0.jpg"}], "names 'Fungi/9/0.jpg', which is of no category"),
        ({"file_name": 1}, "is not an annotation file of iNaturalist: it says images is"),
    ],
)
def test_annotations_of_inaturalist_are_not_believed(tmp_path, images, words):
    save_image(tmp_path / "2018" / "Aves" / "0" / "0.jpg", 0)
    for part in ("train", "val"):
        (tmp_path / f"{part}2018.json").write_text(json.dumps({"images": images}))
    with pytest.raises(MisuseError, match=rf"train2018\.json {words}"):
        open_task("inaturalist2018", tmp_path)


def test_clevr_labels_are_those_of_vtab():
    """VTAB: thrs = [0, 8, 8.5, 9, 9.5, 10, 100], label = the last index whose threshold is below the least depth."""

    def scene(*depths: float) -> dict:
        return {"image_filename": "a.png", "objects": [{"pixel_coords": [0, 0, depth]} for depth in depths]}

    expected = {
        0.1: 0,
        7.99: 0,
        8.0: 0,
        8.01: 1,
        8.5: 1,
        8.51: 2,
        9.0: 2,
        9.2: 3,
        9.5: 3,
        9.6: 4,
        10.0: 4,
        10.1: 5,
        99: 5,
    }
    assert {depth: distance_label(scene(120, depth, 100)) for depth in expected} == expected
    thresholds = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
    for depth in np.random.default_rng(0).uniform(5, 14, 200):
        assert distance_label(scene(depth, 50)) == np.flatnonzero(thresholds - depth < 0).max()
    assert [count_label(scene(*range(n))) for n in range(3, 11)] == list(range(8))
    with pytest.raises(MisuseError, match=r"a\.png of Clevr has 2 objects"):
        count_label(scene(9, 9))
    with pytest.raises(MisuseError, match="an object at depth -1"):
        distance_label(scene(-1, 9))


# ==== the command ====


def test_a_folder_of_classes_from_pixels_to_result(tmp_path, monkeypatch, capsys):
    for part, n in (("train", 12), ("val", 4)):
        for seed, kind in enumerate(("dark", "light")):
            for row in range(n):
                path = tmp_path / "data" / part / kind / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(seed * 100 + row).integers(0, 60, (32, 32, 3))
                Image.fromarray((noise + 150 * seed).astype(np.uint8)).save(path)
    config = StudentConfig("test_resnet", 32)
    torch.manual_seed(0)
    run = tmp_path / "run"
    export_weights(build_student(config), describe_student(config), run / "student.safetensors")
    fast = ("--loader", "torch", "--workers", "1", "--device", "cpu", "--epochs", "20")
    where = ("--root", tmp_path / "data")
    monkeypatch.setattr(sys, "argv", ["rob", "eval", "transfer", str(run), "folder", *map(str, where), *fast])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert re.search(r"linear │ +100\.00 .* 24 │ +8 │", capsys.readouterr().out)
        monkeypatch.setattr("rob.student_train.evaluate.transfer.pack", lambda *_: pytest.fail("packed again"))
    result = json.loads((run / "eval" / "transfer-folder.json").read_text())
    assert result["top1"] == result["knn"]["top1"] == 100


def test_limit_takes_training_images_alone(tmp_path):
    for part in ("train", "test"):
        for kind in ("a", "b"):
            for row in range(4):
                save_image(tmp_path / part / kind / f"{row}.png", row)
    train, test = packed_task("folder", tmp_path, tmp_path / "packed", limit=4, max_resolution=16)
    counts = [sorted(json.loads(path.with_name(path.name + ".json").read_text())["labels"]) for path in (train, test)]
    assert counts == [[0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_another_folder_is_not_taken_for_one_packed_before(tmp_path):
    for root in ("a", "b"):
        for part in ("train", "test"):
            save_image(tmp_path / root / part / root / "0.png", 0)
    packed = [packed_task("folder", tmp_path / root, tmp_path / "packed")[0] for root in ("a", "b", "a")]
    assert [Beton(path).manifest.classes for path in packed] == [("a",), ("b",), ("a",)]
    assert packed[0] == packed[2]


@pytest.mark.parametrize("change", ["a class more", "an image more", "an image less", "another label", "other pixels"])
def test_a_folder_that_has_changed_is_packed_anew(tmp_path, change):
    root = tmp_path / "root"
    for part in ("train", "test"):
        for kind in ("a", "b"):
            for row in range(2):
                save_image(root / part / kind / f"{row}.png", row)
    before = Beton(packed_task("folder", root, tmp_path / "packed")[0]).manifest
    image = root / "train" / "a" / "1.png"
    if change == "a class more":
        save_image(root / "train" / "c" / "0.png", 7)
    elif change == "an image more":
        save_image(root / "train" / "a" / "2.png", 7)
    elif change == "an image less":
        image.unlink()
    elif change == "another label":
        image.rename(root / "train" / "b" / "2.png")
    else:
        save_image(image, 9)
    after = Beton(packed_task("folder", root, tmp_path / "packed")[0]).manifest
    assert (after.paths, after.labels, after.classes, after.fingerprint) != (
        *(before.paths, before.labels, before.classes, before.fingerprint),
    )


# ==== what is refused ====


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "cifar10",
            r"cifar10 is not in .*\. Fetch cifar-10-python\.tar\.gz .* ROOT/cifar-10-batches-py; or pass `download`",
        ),
        ("cifar100", r"unpack it to ROOT/cifar-100-python"),
        ("inaturalist2021", r"ROOT/2021_train/00000_Animalia_.*/\*\.jpg and ROOT/2021_valid"),
        ("inaturalist2018", r"train2018\.json and val2018\.json"),
        ("places365", r"ROOT/data_256_standard, ROOT/val_256 and ROOT"),
        ("clevr-dist", r"unpack it to ROOT/clevr/CLEVR_v1\.0"),
        ("folder", r"no folders train and test.*Put the images into ROOT/train/CLASS/"),
    ],
)
def test_data_that_are_not_there(tmp_path, task, message):
    with pytest.raises(MisuseError, match=message) as refused:
        open_task(task, tmp_path)
    assert "\n" not in str(refused.value)


def test_what_cannot_be(tmp_path):
    with pytest.raises(MisuseError, match="unknown transfer task 'cifar': did you mean cifar10"):
        open_task("cifar", tmp_path)
    with pytest.raises(MisuseError, match="inaturalist2018 has no download that rob could make"):
        open_task("inaturalist2018", tmp_path, download=True)
    save_image(tmp_path / "train" / "1.png", 1)
    save_image(tmp_path / "test" / "a" / "1.png", 1)
    with pytest.raises(MisuseError, match="train: images must lie in one sub-folder a class"):
        open_task("folder", tmp_path)
