"""Names that nobody knows, and options that a command has no use for. What a configuration refuses by itself is tested with it;
that an error names options, in ``test_settings``."""

import sys

import pytest
import torch

from support.cli import FAST
from support.tiny import TEACHER


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--teacher",
            "test_efficientnet_gm",
            r"unknown teacher 'test_efficientnet_gm': did you mean .*test_efficientnet_gn",
        ),
        (
            "--recipe",
            "dinno",
            r"unknown recipe 'dinno': did you mean dino or rob-dino\? \(known: dino, mild, moco-v2, ",
        ),
        ("--loader", "fcv", r"unknown loader 'fcv': did you mean ffcv\? \(known: auto, ffcv, gpu, torch\)"),
        ("--global-scale", (0.5, 0.2), "--global-scale is 0.5,0.2, expected 0 < LOW <= HIGH"),
        ("--centre", (0.9, "--global-scale", 0.5, 1), "--centre and --global-scale both say what a global crop shows"),
        ("--checkpoint", "nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--encoding", "dense", "dense needs prototype logits, but .* has no head: give a number of --prototypes"),
    ],
)
def test_cache_teacher_refuses(refused, made, tmp_path, option, value, message):
    values = value if isinstance(value, tuple) else (value,)
    refused(2, message, "cache-teacher", made.data, tmp_path / "t.zarr", *made.cache, option, *values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--student", "resnet19"), "unknown student 'resnet19': did you mean resnet"),
        (("--precision", "fp16"), "fp16 needs a GPU: on a CPU use fp32"),
        (("--batch-size", 25), "--batch-size 25 is more than the 24 images"),
        (("--step-targets", 3), "holds 2 views .* --step-targets 2"),
        (("--warmup-epochs", 1), "`?--warmup-epochs`? 1 leave nothing of a run of"),
        (("--trust", 0.02), "--trust is for --optimiser lars, and it is adamw"),
        (("--objective", "dino"), "the teacher has no head: fit prototypes"),
        (("--objective", "disco", "--pairing", "cross"), "disco compares the same views: leave out --pairing"),
        (("--student", "test_vit", "--small-images", "--image-size", 30), "cannot take images of 30 x 30 px"),
        # options that contradict each other
        (("--teacher", TEACHER), "--teacher is for --targets online; the store .* leave --teacher out"),
        (("--checkpoint", "a.pth"), "--checkpoint is for --targets online"),
        (("--views", 2), "--views is for --targets online"),
        (("--view-size", 64), "--view-size is for --targets online"),
        (("--recipe", "swav"), "--recipe is for --targets online"),
        (("--global-scale", 0.5, 1), "--global-scale is for --targets online"),
        (("--targets", "online"), "--targets online needs --teacher NAME"),
        (
            ("--targets", "momentum", "--objective", "embedding"),
            "--objective embedding needs a teacher: .* there is dino",
        ),
        (
            ("--targets", "momentum", "--objective", "moco", "--prototypes", 8),
            "--prototypes: --objective moco has none",
        ),
        (("--targets", "momentum", "--objective", "dino", "--teacher", TEACHER), "with momentum there is no teacher"),
        (("--prototypes", 8), "--prototypes is for --targets momentum"),
        (
            ("--pairing", "cross", "--num-local", 1, "--local-size", 64),
            "--local-size 64 is more than --image-size 32: local crops are the smaller ones",
        ),
        (("--local-size", 16), "--local-size is for local crops, and this run has none"),
        (("--local-scale", 0.1, 0.2), "--local-scale is for local crops, and this run has none"),
        (("--targets", "momentum", "--cache-in-memory"), "--cache-in-memory is for a store of targets"),
        (("--freeze-prototypes", 1), "--objective embedding has none"),
        (("--pairing", "same", "--fresh"), "--fresh is for --pairing cross"),
        (("--global-weight", 0.4), "--global-weight is against local crops"),
        (("--targets", "online", "--teacher", "nobody"), "unknown teacher 'nobody'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_train_student_refuses(refused, made, tmp_path, options, message):
    targets, options = (options[1], options[2:]) if options[0] == "--targets" else (made.store, options)
    refused(2, message, "train-student", *made.train_on(targets), "--out", tmp_path / "run", *options)


@pytest.mark.parametrize("command", ["cache-teacher", "train-student", "verify", "eval knn"])
def test_cuda_without_a_gpu(refused, made, tmp_path, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {
        "cache-teacher": (made.data, tmp_path / "t.zarr", *made.cache),
        "train-student": (*made.train, "--out", tmp_path / "run"),
        "verify": (made.store, made.data, "--teacher", TEACHER, "--checkpoint", made.checkpoint),
        "eval knn": ("pixels", made.data, "--test", made.data),
    }[command]
    message = "--device cuda: torch finds no CUDA device here; use --device cpu"
    refused(2, message, *command.split(), *arguments, "--device", "cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cache-teacher DATA OUT --topk 8", "--topk is for --encoding topk, and this is embedding: leave --topk out"),
        ("cache-teacher DATA OUT --encoding dense --store-dtype int8", "--store-dtype is for --encoding embedding"),
        ("eval lowshot pixels DATA --epochs 3", "--epochs is for --finetune: leave --epochs out"),
        ("eval lowshot pixels DATA --lr 0.1", "--lr is for --finetune"),
        ("eval knn pixels DATA --teacher resnet50", "--teacher is for a teacher, and WHAT is pixels"),
    ],
)
def test_an_option_that_is_not_used_is_refused(refused, made, tmp_path, words, message):
    places = {"DATA": made.data, "OUT": tmp_path / "t.zarr"}
    rest = made.cache if words.startswith("cache") else FAST
    refused(2, message, *(places.get(word, word) for word in words.split()), *rest)


def test_transfer_looks_at_what_it_measures_before_it_packs(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("rob.student_train.evaluate.transfer.packed_task", lambda *_, **__: pytest.fail("packed"))
    where = ("folder", "--root", tmp_path)
    refused(2, "typo: no such file", "eval", "transfer", tmp_path / "typo", *where, *FAST)


def test_what_is_for_one_process_is_refused_under_torchrun(refused, made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "rob eval segment is for one process: start it without torchrun"
    refused(2, message, "eval", "segment", "pixels", made.images, made.images, "--device", "cpu")


def test_evaluation_refuses(refused, made, tmp_path):
    knn = ("eval", "knn")
    rest = (made.data, "--test", made.data, *FAST)
    refused(2, "nowhere: no such file", *knn, tmp_path / "nowhere", *rest)
    (tmp_path / "run").mkdir()
    refused(2, r"no student\.safetensors in .*: give a finished run's folder", *knn, tmp_path / "run", *rest)
    refused(2, "needs --teacher NAME", *knn, "teacher", *rest)
    refused(2, "k = 25 neighbours of 24 training images", *knn, "pixels", *rest, "--k", 25)
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "config.json").write_text('{"student": {}}')
    refused(2, "is a run, whose results are of its student", *knn, "pixels", *rest, "--out", tmp_path / "a_run")


def test_images_without_labels_cannot_be_evaluated(rob, refused, made, tmp_path):
    assert rob("pack", made.images / "class0", tmp_path / "flat.beton").code == 0
    refused(
        2, r"flat\.beton has no labels", "eval", "knn", "pixels", tmp_path / "flat.beton", "--test", made.data, *FAST
    )


def test_inspect_and_bench_refuse(refused, made, tmp_path, monkeypatch):
    refused(2, "there is nothing at .*nowhere", "inspect", tmp_path / "nowhere")
    refused(2, "not a target store", "inspect", tmp_path)
    refused(2, "unknown benchmark 'pipelines': did you mean pipeline", "bench", "pipelines")
    refused(2, "unknown command 'train': did you mean train-student", "train", made.data)
    with monkeypatch.context() as without:
        for module in ("rob.benchmarks.loader", "rob.benchmarks.loader_peers"):
            without.delitem(sys.modules, module, raising=False)
        without.setitem(sys.modules, "cv2", None)  # importing it raises ModuleNotFoundError
        refused(2, "bench loader measures cv2, too, which is not installed here: rob doctor", "bench", "loader")
    there = tmp_path / "summary.json"
    there.touch()
    for words in (("bench", "loss", "--out", there), ("demo", "--out", tmp_path)):
        refused(2, "summary.json is there already: pass --overwrite to replace it", *words)
    sheet = ("inspect", made.store, "--sheet", tmp_path / "a.png")
    refused(2, "--sheet of a store needs its images: pass --data", *sheet)
    refused(2, "--recipe is for a .beton, and a store's sheet has", *sheet, "--data", made.data, "--recipe", "swav")
