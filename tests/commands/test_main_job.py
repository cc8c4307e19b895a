"""The main job on the command line: pack, cache, train, evaluate, inspect, verify."""

import json
import re
import shutil
from dataclasses import replace

import torch
from safetensors.torch import load_file

from rob.common.places import place_of
from rob.common.store.reader import TargetStore
from rob.common.store.writer import write_group
from rob.common.views import loader
from rob.student_train.checkpoint import load_student
from support.cli import FAST
from support.tiny import TEACHER, tiny_images


def test_pack_cache_train_evaluate_inspect_verify(rob, made, tmp_path):
    test = tiny_images(tmp_path / "test-images", 8, seed=1)
    outcome = rob("pack", test, tmp_path / "test.beton", "--raw")
    assert outcome.code == 0
    assert "8 images" in outcome.out

    store = tmp_path / "targets.zarr"
    outcome = rob("cache-teacher", made.data, store, *made.cache, "--store-dtype", "float32")
    assert outcome.code == 0, outcome.err
    for expected in ("24 x 2", "bytes a view", "1,024", "free disk", "estimated time", "targets.zarr: complete"):
        assert expected in outcome.out
    assert TargetStore.open(store).manifest.encoding["dtype"] == "float32"

    run = tmp_path / "run"
    outcome = rob("train-student", *made.train_on(store), "--out", run, "--log-every", 1)
    assert outcome.code == 0, outcome.err
    assert re.search(r"run/student\.safetensors: loss \d\.\d{4}, .* images/s", outcome.out)
    assert re.search(
        r"waiting for views .*%, copy and colour .*%, targets .*%, student .*%\. .*\.", outcome.out
    )  # and what to do about it
    assert json.loads((run / "config.json").read_text())["targets"] == str(store)
    load_student(run)

    for what in (run, run / "student.safetensors", "pixels", "teacher"):
        extra = ("--teacher", TEACHER, "--checkpoint", made.checkpoint, "--size", 32) if what == "teacher" else ()
        outcome = rob("eval", "knn", what, made.data, "--test", tmp_path / "test.beton", "--k", 5, *extra, *FAST)
        assert outcome.code == 0, outcome.err
        assert re.search(r"\b5\b.* 24 .* 8 ", outcome.out)
    accuracy = json.loads((run / "eval" / "knn.json").read_text())
    assert accuracy["features"] == "test_resnet"
    assert 0 <= accuracy["top1"] <= accuracy["top5"] == 100

    for path in (made.data, store):
        outcome = rob("inspect", path)
        assert outcome.code == 0
        assert "24" in outcome.out
    outcome = rob("inspect", store, "--data", made.data, "--sheet", tmp_path / "sheet.png")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    teacher = ("--teacher", TEACHER, "--checkpoint", made.checkpoint)
    outcome = rob("verify", store, made.data, *teacher, "--samples", 10, "--device", "cpu", "--workers", 1)
    assert outcome.code == 0, outcome.err
    assert "every chunk is whole; 10 views agree" in outcome.out


def test_dino_on_fitted_prototypes_with_local_crops(rob, made, tmp_path):
    store = tmp_path / "topk.zarr"
    fitted = ("--encoding", "topk", "--topk", 4, "--prototypes", 8)
    assert rob("cache-teacher", made.data, store, *made.cache, *fitted).code == 0
    dino = ("--objective", "dino", "--num-local", 1, "--average", 0.9, "--cache-in-memory")
    outcome = rob("train-student", *made.train_on(store), "--out", tmp_path / "run", *dino)
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pairing"]["pairing"] == "cross"
    warm = ("--objective", "dino", "--teacher-temp", 0.2, "--out", tmp_path / "warm")
    outcome = rob("train-student", *made.train_on(store), *warm)
    assert outcome.code == 2
    assert outcome.err.startswith("error: teacher temperature 0.2 is outside of the store's ladder 0.025 to 0.1: ")
    assert not (tmp_path / "warm").exists()
    assert (tmp_path / "run" / "student_average.safetensors").exists()


def test_the_usual_objective_follows_from_the_targets(rob, made, tmp_path):
    """The words for others are those of test_pinned.py."""
    store = tmp_path / "fitted.zarr"
    assert rob("cache-teacher", made.data, store, *made.cache, "--prototypes", 6).code == 0
    outcome = rob("train-student", *made.train_on(store), "--out", tmp_path / "usual")
    said = " ".join(outcome.out.split() + outcome.err.split())
    assert (
        "--objective dino, since the targets have prototypes; in short runs --objective embedding did as well" in said
    )
    assert json.loads((tmp_path / "usual" / "config.json").read_text())["objective"]["name"] == "dino"


def test_targets_of_patches_are_cached_and_learned_from_unless_a_preset_is_asked_for(rob, made, tmp_path):
    at_224 = ("--view-size", 224, "--views", 1)  # where the tiny teacher has a map of 7 x 7
    for name, words in {"usual": (), "disco": ("--preset", "disco")}.items():
        store = tmp_path / f"{name}.zarr"
        outcome = rob("cache-teacher", made.data, store, *made.cache, *at_224, *words)
        assert outcome.code == 0, outcome.err
        patches = json.loads((store / "zarr.json").read_text())["attributes"].get("patches")
        assert (patches is None) == (name == "disco")
    words = ("--out", tmp_path / "run", "--image-size", 64, "--no-small-images")
    outcome = rob("train-student", *made.train_on(tmp_path / "usual.zarr"), *words)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["name"] == "patch"


def test_momentum_targets_need_no_teacher(rob, made, tmp_path):
    dino = ("--objective", "dino", "--prototypes", 8, "--num-local", 1)
    outcome = rob("train-student", *made.train_on("momentum"), "--out", tmp_path / "run", *dino)
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["branch"]["kind"] == "momentum"
    assert not config["pairing"]["fresh"]
    assert config["freeze_prototypes"] == 1


def test_the_online_teacher_is_the_same_command(rob, made, tmp_path):
    teacher = ("--teacher", TEACHER, "--checkpoint", made.checkpoint, "--view-size", 32, "--views", 2)
    outcome = rob("train-student", *made.train_on("online"), *teacher, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["branch"]["kind"] == "online"


def test_the_same_command_again_goes_on_and_is_done(rob, made, tmp_path):
    command = ("train-student", *made.train, "--out", tmp_path / "run")
    assert rob(*command).code == 0
    weights = load_file(tmp_path / "run" / "student.safetensors")
    outcome = rob(*command)
    assert (outcome.code, "run is complete already: nothing to do" in outcome.out) == (0, True)
    torch.testing.assert_close(load_file(tmp_path / "run" / "student.safetensors"), weights, rtol=0, atol=0)
    assert "nothing to do" in rob("cache-teacher", made.data, made.store, *made.cache).out


def test_the_small_image_form_is_said_unless_asked_for(rob, made, tmp_path):
    words = ("train-student", made.data, "--targets", made.store, "--image-size", 32, "--batch-size", 8, *FAST)
    small = ("--student", "test_resnet", "--epochs", 1, "--hidden-dim", 16)
    assert "--small-images" in rob(*words, *small, "--out", tmp_path / "default").out
    assert "--small-images" not in rob(*words, *small, "--out", tmp_path / "asked", "--small-images").out


def test_a_store_of_another_precision_is_verified_by_option(rob, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "half.zarr")
    write_group(place_of(store).write, "", replace(TargetStore.open(store).manifest, precision="fp16").to_json())
    verify = ("verify", store, made.data, "--teacher", TEACHER, "--checkpoint", made.checkpoint, "--device", "cpu")
    outcome = rob(*verify)
    assert (outcome.code, "fp16 needs a GPU: on a CPU use fp32" in outcome.err) == (2, True)
    outcome = rob(*verify, "--precision", "fp32")
    assert outcome.code == 0, outcome.err


def test_without_ffcv_one_line_says_so(rob, made, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "ffcv_backend", None)
    outcome = rob("cache-teacher", made.data, tmp_path / "t.zarr", *made.cache, "--loader", "auto")
    assert outcome.out.count("the slower torch loader is used") == 1
    assert TargetStore.open(tmp_path / "t.zarr").manifest.geometry == "pillow"


def test_a_plan_is_printed_without_a_run_and_an_untrained_student_needs_only_its_settings(rob, made, tmp_path):
    run = tmp_path / "run"
    outcome = rob("train-student", *made.train, "--out", run, "--plan-only")
    assert outcome.code == 0, outcome.err
    for expected in ("plan", ", 8 in a step", "3 in 1 epoch ", "warning: 3 steps are few"):
        assert expected in outcome.out
    assert not run.exists()
    rob("train-student", *made.train, "--out", run)
    (run / "student.safetensors").unlink()
    outcome = rob("eval", "knn", run, made.data, "--init", "random", "--k", 2, *FAST)
    assert outcome.code == 0, outcome.err
    assert "k-NN of random test_resnet" in outcome.out


def test_a_part_of_a_store_that_grows_does_not_say_that_it_is_complete(rob, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "t.zarr")
    grow = ("cache-teacher", made.data, store, *made.cache, "--views", 3)
    outcome = rob(*grow, "--part", "2/2")  # of one shard
    assert (outcome.code, "1 of 1 shards are missing" in outcome.err + outcome.out) == (0, True)
    assert "t.zarr: complete" not in outcome.err + outcome.out
    outcome = rob(*grow, "--part", "1/2")
    assert "t.zarr: complete" in outcome.err + outcome.out
