"""rob eval with other features, another filter, MSN's protocol and published subsets; and what of these is refused."""

import json
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rob.common.images.beton import Beton
from rob.common.views.loader import LoaderConfig
from rob.student_train.checkpoint import export_weights
from rob.student_train.evaluate import linear_augmented
from rob.student_train.evaluate.labelled import labelled_images
from rob.student_train.evaluate.lowshot import Listed, lowshot
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig, build_student, describe_student
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.cli import FAST
from support.tiny import contents, tiny_beton

SMALL_VIT = ("--size", "32", *FAST, "--batch-size", "16")


@pytest.fixture
def vit(tmp_path):
    """A run folder with an untrained ViT for 32 px."""
    config = StudentConfig("vit_tiny_patch16_224", 32)
    torch.manual_seed(0)
    export_weights(build_student(config), describe_student(config), tmp_path / "vit" / "student.safetensors")
    return tmp_path / "vit"


@pytest.fixture
def cnn(tmp_path):
    config = StudentConfig("test_resnet", 32)
    export_weights(build_student(config), describe_student(config), tmp_path / "cnn" / "student.safetensors")
    return tmp_path / "cnn"


def result(run, task: str) -> dict:
    return json.loads((run / "eval" / f"{task}.json").read_text())


def kept(run) -> list[torch.Tensor]:
    return [load_file(path)["features"] for path in (run / "eval" / "features").glob("*/*.safetensors")]


def test_features_of_a_student(rob, made, vit) -> None:
    task, rest = "knn", (*SMALL_VIT, "--k", 3)
    plain = rob("eval", task, vit, made.data, *rest)
    assert plain.code == 0, plain.err
    assert re.search(r"bicubic to 32 px", plain.out)
    assert result(vit, task)["interpolation"] == "bicubic"
    assert "pooling" not in result(vit, task)
    for features, width in (("cls4", 4 * 192), ("cls+mean", 2 * 192), ("cls", 192)):
        outcome = rob("eval", task, vit, made.data, "--features", features, *rest)
        assert outcome.code == 0, outcome.err
        assert f"vit_tiny_patch16_224, {features}, bicubic" in " ".join(outcome.out.split())
        assert "an earlier result with other features is replaced" in " ".join(outcome.out.split())
        assert result(vit, task)["pooling"] == features
        assert any(rows.shape == (24, width) for rows in kept(vit))
    assert len(kept(vit)) == 4
    network = FrozenNetwork.student(vit, torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.of("cls4").embed(images)[:, -192:], network.embed(images))


def test_bicubic_images_are_other_features(rob, made, cnn) -> None:
    for filter_ in ("bilinear", "bicubic", "bicubic"):
        outcome = rob("eval", "knn", cnn, made.data, "--k", 3, "--size", 24, "--interpolation", filter_, *FAST)
        assert outcome.code == 0, outcome.err
        assert f"{filter_} to 24 px" in outcome.out
    assert result(cnn, "knn")["interpolation"] == "bicubic"
    first, second = kept(cnn)
    assert first.shape == second.shape
    assert 0 < (first - second).abs().max() < 1


def test_features_of_a_teacher(rob, made, tmp_path) -> None:
    """DINOv3's own are its class token; the mean beside it is twice as wide."""
    torch.manual_seed(0)
    checkpoint = tmp_path / "dinov3.safetensors"
    save_file(timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict(), checkpoint)
    named = ("teacher", made.data, "--teacher", "dinov3_vits16", "--checkpoint", checkpoint, "--out", tmp_path)
    assert rob("eval", "knn", *named, "--k", 3, *SMALL_VIT).code == 0
    assert result(tmp_path, "knn")["pooling"] == "cls"
    assert rob("eval", "knn", *named, "--k", 3, "--features", "cls+mean", *SMALL_VIT).code == 0
    assert result(tmp_path, "knn")["pooling"] == "cls+mean"
    class_token, both = sorted(kept(tmp_path), key=lambda rows: rows.shape[1])
    torch.testing.assert_close(both[:, :384], class_token)
    teacher = load_teacher(TeacherConfig("dinov3_vits16", checkpoint, teacher_features="cls+mean"))
    measured = FrozenNetwork.teacher(teacher, 32, torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(measured.embed(images), dim=1), teacher(images))


def test_msns_protocol_lies_beside_ours(rob, made) -> None:
    out = made.data.parent / "lowshot"
    lowshot = (
        "eval",
        "lowshot",
        "pixels",
        made.data,
        "--test",
        made.data,
        "--per-class",
        5,
        "--seeds",
        2,
        "--out",
        out,
    )
    for words in ((), ("--protocol", "msn")):
        outcome = rob(*lowshot, *words, *FAST)
        assert outcome.code == 0, outcome.err
    assert result(out, "lowshot")["regularisation"] == 1e-3
    assert result(out, "lowshot-msn")["regularisation"] == 2.5e-3
    outcome = rob(*lowshot, "--regularisation", 0.1, *FAST)
    assert "another regularisation is replaced" in " ".join(outcome.out.split())


def test_a_published_subset(rob, made, tmp_path) -> None:
    paths = Beton(made.data).manifest.paths
    names = tmp_path / "1percent.txt"
    names.write_text("\n".join(path.rpartition("/")[2] for path in paths[::3]))
    test = tiny_beton(tmp_path, 40, seed=1).path
    outcome = rob("eval", "lowshot", "pixels", made.data, "--test", test, "--out", tmp_path, "--subset", names, *FAST)
    assert outcome.code == 0, outcome.err
    (entry,) = result(tmp_path, "lowshot")["results"]
    network = FrozenNetwork.pixels(32, torch.device("cpu"))
    train, held_out = labelled_images(network, made.data, test, LoaderConfig("torch", 16, 1))
    expected = lowshot(train.features, held_out.features, Listed(str(names), tuple(range(0, 24, 3))), (0,))
    assert entry == json.loads(json.dumps(expected.to_json()))
    assert (entry["labels"], entry["num_train"], entry["num_test"]) == (str(names), 8, 40)


def test_a_cnn_has_no_class_token(refused, made, cnn) -> None:
    before, words = contents(cnn), ("--features", "cls4")
    message = "--features cls4 wants the class token of a ViT and test_resnet has none"
    for task in ("knn", "linear", "lowshot"):
        refused(2, message, "eval", task, cnn, made.data, *words, *FAST)
    refused(2, message.replace("test_resnet", "pixels"), "eval", "knn", "pixels", made.data, *words, *FAST)
    assert contents(cnn) == before


def test_other_refusals(refused, made, tmp_path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("nobody.jpg\nno one.jpg\n")
    lowshot = ("eval", "lowshot", "pixels", made.data)
    tested = (*lowshot, "--test", made.data)
    refused(2, "unknown features 'cls5': did you mean cls", "eval", "knn", "pixels", made.data, "--features", "cls5")
    refused(2, "unknown interpolation 'cubic'", "eval", "knn", "pixels", made.data, "--interpolation", "cubic")
    refused(2, "unknown protocol 'nsm'", *tested, "--protocol", "nsm")
    refused(2, r"--subset .*names.txt: 2 of 2 names .* \(nobody.jpg, no one.jpg\): pack", *tested, "--subset", names)
    refused(2, "--subset may name any image of TRAIN, .*: give --test", *lowshot, "--subset", names)
    refused(2, "--protocol is for frozen features", *tested, "--finetune", "--protocol", "msn")
    refused(2, "--teacher-features .*cls wants the class token", "cache-teacher", made.data, tmp_path / "t.zarr", *made.cache,
            "--teacher-features", "cls")  # fmt: skip
    refused(
        2,
        "--interpolation is for --targets online",
        "train-student",
        *made.train,
        "--out",
        tmp_path / "run",
        "--interpolation",
        "bicubic",
    )


def test_bicubic_targets(rob, made, tmp_path) -> None:
    outcome = rob("cache-teacher", made.data, tmp_path / "t.zarr", *made.cache, "--interpolation", "bicubic")
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "t.zarr" / "zarr.json").read_text())["attributes"]
    assert manifest["recipe"]["interpolation"] == "bicubic"
    assert rob("views", tmp_path / "v.png", "--data", made.data, "--images", 1, "--interpolation", "bicubic").code == 0


def test_a_refit_on_crops_goes_on(rob, made, cnn, monkeypatch) -> None:
    arguments = ("eval", "linear", cnn, made.data, "--augment", "--epochs", 3, "--batch-norm", *FAST)
    outcome = rob(*arguments)
    assert outcome.code == 0, outcome.err
    whole = result(cnn, "linear-augment")
    assert whole["num_train"] == 24 - 4  # all but the fifth that is tested on
    save, saved = linear_augmented.save_checkpoint, []

    def killed_in_the_refit(*rest) -> None:
        save(*rest)
        saved.append(rest[0].name)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(linear_augmented, "save_checkpoint", killed_in_the_refit)
    assert rob(*arguments).code == 130
    assert rob(*arguments).code == 0
    assert saved == ["linear-augment.checkpoint.pt"] * 3 + ["refit-linear-augment.checkpoint.pt"] * 3
    assert result(cnn, "linear-augment") == whole
    assert not list((cnn / "eval").glob("*.pt"))
    assert np.isfinite(whole["top1"])
