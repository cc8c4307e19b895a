"""Teachers, stores and folders that are not what a command needs."""

import json
import re
import shutil

from safetensors.torch import load_file, save_file

from support.cli import FAST
from support.tiny import TEACHER, tiny_images, tiny_teacher_checkpoint


def test_folders_and_stores_are_no_images_and_no_runs(refused, made, tmp_path, monkeypatch):
    refused(
        2,
        "images: a folder; .* rob pack .*images.beton",
        "cache-teacher",
        made.images,
        tmp_path / "t.zarr",
        *made.cache,
    )
    refused(2, "targets.zarr: a target store; give the packed images", "eval", "knn", "pixels", made.store, *FAST)
    store = shutil.copytree(made.store, tmp_path / "store.zarr")
    train = (made.data, "--targets", store, "--student", "test_resnet", "--image-size", 32, "--batch-size", 8, *FAST)
    monkeypatch.setattr("rob.student_train.planner.try_steps", None)  # which take a while: this is said before
    refused(2, "--out .*store.zarr is a target store: give the run a folder", "train-student", *train, "--out", store)


def test_a_store_that_lost_targets_is_not_complete(refused, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "store.zarr")
    lost = next(file for file in (store / "embedding" / "c").rglob("*") if file.is_file())
    lost.unlink()
    message = f"store.zarr is damaged, {lost} is missing: delete the store and run rob cache-teacher again"
    refused(1, message, "cache-teacher", made.data, store, *made.cache)
    refused(1, message, "inspect", store)


def test_a_checkpoint_of_another_shape_names_the_first_three(refused, made, tmp_path):
    tensors = load_file(made.checkpoint)
    changed = [name for name, values in tensors.items() if values.ndim == 4][:4]
    for name in changed:
        tensors[name] = tensors[name].repeat(2, 1, 1, 1)
    save_file(tensors, tmp_path / "other.safetensors")
    arguments = (*made.cache, "--checkpoint", tmp_path / "other.safetensors")
    shape = r" is \(\d+(, \d+){3}\), expected \(\d+(, \d+){3}\)"
    message = f"is not a {TEACHER}: " + "; ".join(f"{re.escape(name)}{shape}" for name in changed[:3]) + ".*1 more"
    refused(2, message, "cache-teacher", made.data, tmp_path / "t.zarr", *arguments)


def test_a_store_of_something_else(rob, refused, made, tmp_path):
    other = tiny_images(tmp_path / "other", 24, seed=5)
    assert rob("pack", other, tmp_path / "other.beton").code == 0
    train = ("--out", tmp_path / "run", *made.train[1:])
    refused(
        2,
        "was cached from another data set: .* give the .beton that it was cached from",
        "train-student",
        tmp_path / "other.beton",
        *train,
    )
    teacher = ("--teacher", TEACHER, "--checkpoint", made.checkpoint)
    refused(2, "another data set", "verify", made.store, tmp_path / "other.beton", *teacher, "--device", "cpu")

    another = tiny_teacher_checkpoint(tmp_path, seed=1).checkpoint
    verify = ("verify", made.store, made.data, "--teacher", TEACHER, "--checkpoint", another, "--device", "cpu")
    refused(2, f"was cached from teacher {TEACHER} with weights", *verify)

    store = shutil.copytree(made.store, tmp_path / "targets.zarr")
    complete = r"targets\.zarr is already there and complete"
    refused(2, complete, "cache-teacher", made.data, store, *made.cache, "--recipe", "swav")
    refused(2, complete, "cache-teacher", made.data, store, *made.cache, "--checkpoint", another)
    refused(2, complete, "cache-teacher", tmp_path / "other.beton", store, *made.cache)


def test_a_store_that_is_none_or_of_another_time(refused, made, tmp_path):
    def words(store: object) -> tuple:
        return ("train-student", *made.train_on(store), "--out", tmp_path / "run")

    none = "there is no target store at .*nowhere: make one with rob cache-teacher"
    refused(2, none, *words(tmp_path / "nowhere"))
    (tmp_path / "folder").mkdir()
    refused(2, "folder is not a target store: make one with rob cache-teacher", *words(tmp_path / "folder"))
    store = shutil.copytree(made.store, tmp_path / "old.zarr")
    group = json.loads((store / "zarr.json").read_text())
    group["attributes"]["format_version"] = 0
    (store / "zarr.json").write_text(json.dumps(group))
    refused(2, "has format version 0, this rob reads version 1: cache the targets again", *words(store))


def test_a_damaged_chunk(refused, rob, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "targets.zarr")
    chunk = next(path for path in (store / "embedding" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    verify = ("verify", store, made.data, "--teacher", TEACHER, "--checkpoint", made.checkpoint, "--device", "cpu")
    refused(1, "chunk 0 of array 'embedding' .* is damaged", *verify)
    outcome = rob("train-student", *made.train_on(store), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert re.match("error: .*chunk 0 of array 'embedding' .* is damaged", outcome.err)
    assert outcome.err.count("\n") == 1
