"""rob eval knn, linear and lowshot: on a student, files and resuming; what they refuse."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rob.common.images.pack import PackConfig, pack
from rob.common.views.loader import LoaderConfig
from rob.student_train.checkpoint import export_weights
from rob.student_train.evaluate import finetune, linear_augmented, network
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.labelled import labelled_images
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig, build_student, describe_student
from rob.teacher_cache.teachers import load_teacher
from support.tiny import tiny_teacher_checkpoint

FAST = ("--loader", "torch", "--workers", "1", "--device", "cpu", "--batch-size", "16")


def stripes(folder: Path, classes: tuple[str, ...], n: int, seed: int) -> Path:
    """``n`` noisy 32 px pictures a class, whose classes are directions of stripes: easy for any convolution."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for row in range(n):
            wave = 128 + 80 * np.sin(np.arange(32) * 1.2 + random.uniform(0, 6))
            pixels = np.tile(wave, (32, 1)) if name == "across" else np.tile(wave[:, None], (1, 32))
            if name == "flat":
                pixels = np.full((32, 32), 128.0)
            noisy = pixels[..., None] + random.normal(0, 30, (32, 32, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{row:02}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    """Packed stripes to learn from and to test on. Not to be changed."""
    folder = tmp_path_factory.mktemp("stripes")
    for name, n in (("train", 20), ("test", 10)):
        images = stripes(folder / name, ("across", "down"), n, n)
        pack(PackConfig(str(images), folder / f"{name}.beton", raw=True, workers=1))
    return SimpleNamespace(train=folder / "train.beton", test=folder / "test.beton")


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run folder with a student that has not been trained."""
    config = StudentConfig("test_resnet", 32)
    torch.manual_seed(0)
    export_weights(build_student(config), describe_student(config), tmp_path / "run" / "student.safetensors")
    return tmp_path / "run"


def result(run_folder: Path, task: str) -> dict:
    return json.loads((run_folder / "eval" / f"{task}.json").read_text())


def test_features_are_shared_by_the_tasks(rob, data, run_folder, monkeypatch):
    assert rob("eval", "knn", run_folder, data.train, "--test", data.test, *FAST).code == 0
    assert result(run_folder, "knn")["k"] == 20
    monkeypatch.setattr(network, "extract_features", lambda *_, **__: pytest.fail("extracted again"))
    outcome = rob("eval", "knn", run_folder, data.train, "--test", data.test, "--k", 1, "--k", 5, *FAST)
    assert re.search(r"│ +1 │.*\n.*│ +5 │", outcome.out), outcome.out
    knn = result(run_folder, "knn")
    assert [entry["k"] for entry in knn["sweep"]] == [1, 5]
    assert knn["k"] == 1
    assert knn["top1"] == knn["sweep"][0]["top1"]

    outcome = rob("eval", "linear", run_folder, data.train, "--test", data.test, "--epochs", 20, *FAST)
    assert outcome.code == 0, outcome.err
    linear = result(run_folder, "linear")
    assert (linear["num_train"], linear["num_validation"], linear["num_test"]) == (40, 4, 20)
    assert len(linear["sweep"]) == 20
    assert linear["top1"] > 80
    assert linear["chosen"]["validation_top1"] == max(setting["validation_top1"] for setting in linear["sweep"])

    outcome = rob(
        "eval", "lowshot", run_folder, data.train, "--test", data.test, "--percent", 10, "--per-class", 5, *FAST
    )
    assert outcome.code == 0, outcome.err
    assert re.search(r"10 % │ +4 │.*\n.*5 a class │ +10 │", outcome.out), outcome.out
    assert [entry["labels"] for entry in result(run_folder, "lowshot")["results"]] == ["10 %", "5 a class"]


def test_without_a_test_set_a_fifth_is_held_out(rob, data, run_folder):
    assert rob("eval", "linear", run_folder, data.train, "--epochs", 5, "--lr", 0.1, *FAST).code == 0
    linear = result(run_folder, "linear")
    assert (linear["num_train"], linear["num_validation"], linear["num_test"]) == (32, 4, 8)
    assert linear["test"].startswith("a fifth of")
    assert len(linear["sweep"]) == 4


def test_augmented_linear_learns_and_resumes_to_the_same(rob, data, run_folder, monkeypatch):
    arguments = ("eval", "linear", run_folder, data.train, "--test", data.test, "--augment", "--epochs", 8, *FAST)
    assert rob(*arguments).code == 0
    whole = result(run_folder, "linear-augment")
    assert whole["top1"] > 80
    assert not list((run_folder / "eval").glob("*.pt"))

    save, saved = linear_augmented.save_checkpoint, []

    def killed_after_three(*rest):
        save(*rest)
        saved.append(rest)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(linear_augmented, "save_checkpoint", killed_after_three)
    assert rob(*arguments).code == 130
    assert rob(*arguments, "--seed", 1).code == 2  # the checkpoint is of another seed
    assert rob(*arguments).code == 0
    assert len(saved) == 8 + 8  # and the refit
    assert result(run_folder, "linear-augment") == whole


def test_finetuning_trains_the_network_and_goes_on(rob, data, run_folder, monkeypatch):
    run, seeds = finetune.finetune, []

    def killed_at_the_second(*rest):
        seeds.append(rest[-1])
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return run(*rest)

    arguments = ("eval", "lowshot", run_folder, data.train, "--test", data.test, "--per-class", 5)
    options = ("--finetune", "--epochs", 5, "--lr", 1e-3, "--seeds", 2, *FAST)
    monkeypatch.setattr(finetune, "finetune", killed_at_the_second)
    assert rob(*arguments, *options).code == 130
    outcome = rob(*arguments, *options)
    assert outcome.code == 0, outcome.err
    assert seeds == [0, 1, 1]
    tuned = result(run_folder, "lowshot-finetune")["results"][0]
    assert (tuned["num_train"], tuned["num_test"], len(tuned["top1"])) == (10, 20, 2)
    assert tuned["mean"] > 80


def test_what_has_no_weights_cannot_be_finetuned(rob, data):
    outcome = rob("eval", "lowshot", "pixels", data.train, "--test", data.test, "--per-class", 1, "--finetune", *FAST)
    assert outcome.code == 2
    assert "error: pixels cannot be fine-tuned" in outcome.err


def test_one_clear_sentence(rob, data, run_folder, tmp_path):
    def refused(message: str, *arguments: object, tasks: tuple[str, ...] = ("linear",)) -> None:
        for task in tasks:
            outcome = rob("eval", task, *arguments, *FAST)
            assert outcome.code == 2
            assert re.fullmatch(f"error: .*{message}.*\n", outcome.err), outcome.err

    flat = tmp_path / "flat.beton"
    pack(PackConfig(str(stripes(tmp_path / "images", ("across",), 3, 1) / "across"), flat, workers=1))
    tasks = ("knn", "linear", "lowshot")
    refused(r"flat\.beton has no labels", run_folder, flat, "--test", data.test, tasks=tasks)
    refused("packed images, in the place of a finished run's folder", data.train, run_folder)
    more = tmp_path / "more.beton"
    pack(PackConfig(str(stripes(tmp_path / "more", ("across", "down", "flat"), 2, 2)), more, workers=1))
    refused("class 'flat' of the test set is not in the training set", run_folder, data.train, "--test", more)
    config = StudentConfig("vit_tiny_patch16_224", 32, small_images=False)
    export_weights(build_student(config), describe_student(config), tmp_path / "vit.safetensors")
    where = (tmp_path / "vit.safetensors", data.train, "--test", data.test)
    refused(r"cannot take images of 40 x 40 px: .*40.* divisible by .*16", *where, "--size", 40)
    outcome = rob("eval", "linear", run_folder, more, "--test", data.test, *FAST)
    assert outcome.code == 0  # one of two to choose by is enough
    single = tmp_path / "single.beton"
    pack(PackConfig(str(stripes(tmp_path / "single", ("across", "down"), 1, 2)), single, workers=1))
    refused("class 'across' has one image, none is left to train on", run_folder, single)


def test_the_same_in_python(data, run_folder):
    import rob

    network = rob.FrozenNetwork.student(run_folder, torch.device("cpu"))
    train, held_out = rob.labelled_images(network, data.train, data.test, rob.LoaderConfig("torch", 16, 1), run_folder)
    result = rob.linear(train.features, held_out.features, rob.LinearConfig(epochs=20))
    assert result.top1 > 80
    assert rob.lowshot(train.features, held_out.features, rob.Share(per_class=5)).mean > 60


def test_the_same_network_untrained(rob, data, run_folder):
    """Its floor: other weights, a result of its own."""
    config = StudentConfig("test_resnet", 32)
    torch.manual_seed(7)
    export_weights(build_student(config), describe_student(config), run_folder / "student.safetensors")
    for init in ("student", "random", "random"):
        outcome = rob("eval", "knn", run_folder, data.train, "--test", data.test, "--k", 5, "--init", init, *FAST)
        assert outcome.code == 0, outcome.err
    trained, untrained = result(run_folder, "knn"), result(run_folder, "knn-random")
    assert untrained["features"] == "random test_resnet"
    assert untrained["weights"] != trained["weights"]
    assert len(list((run_folder / "eval" / "features").iterdir())) == 4  # the second random one was the first
    assert "leave it out" in rob("eval", "knn", "pixels", data.train, "--init", "random", *FAST).err
    assert "did you mean random" in rob("eval", "knn", run_folder, data.train, "--init", "randm", *FAST).err
    for kind, label in (("images", 200), ("masks", 1)):
        (run_folder / kind).mkdir()
        Image.fromarray(np.pad(np.full((16, 16), label, np.uint8), 8)).save(run_folder / kind / "a.png")
    starts = []
    for seed in (0, 0, 1):
        options = ("--init", "random", "--seed", seed, "--epochs", 1, "--device", "cpu")
        outcome = rob("eval", "segment", run_folder, run_folder, run_folder, *options)
        assert outcome.code == 0, outcome.err
        starts.append(result(run_folder, "segment-random")["weights"])
    assert starts[0] == starts[1] == untrained["weights"] != starts[2]


@pytest.mark.parametrize("prototypes", [0, 12], ids=["without a head", "with a head"])
def test_a_teacher_is_measured_by_its_backbone(rob, data, tmp_path, prototypes):
    """Not by what its head makes of it: DINO's protocol, and what students are measured by."""
    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=prototypes)
    named = ("--teacher", teacher.name, "--checkpoint", teacher.checkpoint, "--size", 32, "--out", tmp_path)
    assert rob("eval", "knn", "teacher", data.train, "--test", data.test, "--k", 5, *named, *FAST).code == 0
    model = load_teacher(teacher)
    network = FrozenNetwork("", model.backbone, 32, model.mean, model.std, "", torch.device("cpu"))
    train, test = labelled_images(network, data.train, data.test, LoaderConfig("torch", 16, 1))
    expected = knn(train.features, test.features, 5)
    assert result(tmp_path, "knn")["top1"] == expected.top1
    kept = [load_file(path)["features"] for path in (tmp_path / "eval" / "features").glob("*/*.safetensors")]
    assert any(torch.equal(features, train.features.features) for features in kept)


def test_results_are_added_or_replaced_with_a_note(rob, data, run_folder):
    lowshot = ("eval", "lowshot", run_folder, data.train, "--test", data.test, "--seeds", 1, *FAST)
    assert rob(*lowshot, "--percent", 10, "--per-class", 2).code == 0
    outcome = rob(*lowshot, "--per-class", 5, "--per-class", 2)
    assert [entry["labels"] for entry in result(run_folder, "lowshot")["results"]] == ["10 %", "2 a class", "5 a class"]
    assert "replaced" not in outcome.out
    tune = ("--finetune", "--epochs", 1)
    assert rob(*lowshot, "--per-class", 2, *tune).code == 0
    outcome = rob(*lowshot, "--per-class", 5, *tune, "--lr", 1e-3)
    assert [entry["labels"] for entry in result(run_folder, "lowshot-finetune")["results"]] == ["5 a class"]
    assert "an earlier result with another lr is replaced" in outcome.out

    knn = ("eval", "knn", run_folder, data.train, *FAST)
    assert "replaced" not in rob(*knn, "--test", data.test).out
    assert "replaced" not in rob(*knn, "--test", data.test).out
    assert "knn.json: an earlier result with another test set is replaced" in rob(*knn).out


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        *(("linear", "--lr", -1), ("linear", "--lr", 1e30), ("linear", "--weight-decay", -1)),
        *(("lowshot", "--percent", 0), ("lowshot", "--percent", 101), ("lowshot", "--lr", -1), ("detect", "--lr", 0)),
        ("knn", "--workers", -1),
    ],
)
def test_values_out_of_range(rob, data, run_folder, task, option, value):
    outcome = rob("eval", task, run_folder, data.train, option, value)
    assert outcome.code == 2
    assert f"Invalid value for '{option}'" in outcome.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 70.3 GiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_sentence(rob, data, run_folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(network, "extract_features", fail)
    outcome = rob("eval", "knn", run_folder, data.train, "--size", 48, *FAST)
    assert outcome.code == 2
    expected = "error: not enough memory for 16 images of 48 x 48 px at a time: lower --batch-size or --size\n"
    assert outcome.err == expected
    monkeypatch.setattr(network, "extract_features", lambda *_, **__: [][1])
    with pytest.raises(IndexError):  # any other error stays what it is
        rob("eval", "knn", run_folder, data.train, "--size", 48, *FAST)
