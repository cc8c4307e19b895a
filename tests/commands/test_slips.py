"""Nothing is lost by a slip: what is there stays, ~ is the home, and what is no folder of images is told what to do."""

import re
from pathlib import Path

import pytest

from support.tiny import tiny_images


def test_what_is_there_is_replaced_only_when_asked(rob, refused, made, tmp_path):
    out = tmp_path / "data.beton"
    assert rob("pack", made.images, out).code == 0
    refused(2, r"data\.beton is there already: pass --overwrite", "pack", made.images, out, "--limit", 2)
    outcome = rob("pack", made.images, out, "--limit", 2, "--overwrite")
    assert (outcome.code, "2 images" in outcome.out) == (0, True)
    picture = tmp_path / "preview.png"
    picture.write_bytes(b"mine")
    refused(2, "there already", "views", picture, "--data", made.data)
    refused(2, "there already", "inspect", made.data, "--sheet", picture)
    refused(2, "there already", "compare", tmp_path, "--out", picture)


def test_a_tilde_is_the_home(rob, made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rob("pack", made.images, "~/data.beton").code == 0
    assert (tmp_path / "home" / "data.beton").exists()
    assert not Path("~").exists()


def test_what_lies_on_this_machine_is_not_written_to_an_address(refused, made, tmp_path, monkeypatch):
    """Else there would be a folder named s3:."""
    monkeypatch.chdir(tmp_path)
    for words in (
        ("pack", made.images, "s3://b/x.beton"),
        ("views", "file:///x.png", "--data", made.data),
        ("inspect", made.data, "--sheet", "s3://b/x.png"),
        ("sweep", "s3://b/x", "--vary", "seed=1", "--", made.data),
        ("eval", "knn", "pixels", made.data, "--out", "s3://b/x"),
        ("compare", tmp_path, "--out", "s3://b/x.png"),
        ("report", tmp_path, "--out", "s3://b/x.html"),
        ("embed", tmp_path, made.data, "gs://b/x.npy"),
        ("export-teacher", tmp_path, "s3://b/x.safetensors"),
    ):
        refused(2, r"[a-z0-9]+://(b|)/x[.a-z]* is an address, and this is written to this machine: give a path", *words)


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "validation", "test")])
def test_parts_of_a_data_set_are_asked_about(rob, refused, tmp_path, parts):
    for part in parts:
        tiny_images(tmp_path / "photos" / part, 2)
    photos = tmp_path / "photos"
    refused(
        2,
        rf"photos has .*{parts[0]}/.*, named like parts .* SOURCE \(.*\), or --split all",
        "pack",
        photos,
        tmp_path / "a.beton",
    )
    outcome = rob("pack", photos, tmp_path / "all.beton", "--split", "all")
    assert outcome.code == 0
    assert f"{2 * len(parts)} images" in outcome.out
    assert "no classes" in outcome.out
    assert "2 classes" in rob("pack", photos / parts[0], tmp_path / "part.beton").out
    tiny_images(tmp_path / "photos" / "more" / "below", 1)
    outcome = rob("pack", photos, tmp_path / "deep.beton")
    assert re.search(
        r"no classes: they would be folders directly in .*photos, and .*/.*/.* lies elsewhere", outcome.out
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://example.org/photos.zip", "an archive; unpack it"),
        ("photos/*.jpg", "no file fits this pattern"),
        ("photos.zip", "an archive; unpack it .unzip photos.zip."),
        ("photos.tar.xz", "xz -dk photos.tar.xz, and give photos.tar"),
        ("one.jpg", "a single image; give the folder"),
        ("list.txt", "1 of its 1 images are missing: x"),
    ],
)
def test_what_is_no_folder_says_what_to_do_instead(refused, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        Path(name).write_bytes(b"x")
    refused(2, said, "pack", name, tmp_path / "out.beton")


def test_a_sweep_tries_the_words_of_every_cell_before_the_first_run(refused, made, tmp_path):
    out = tmp_path / "sweep"
    words = ("--vary", "epochs=1,0", "--device", "cpu", "--", made.data, "--targets", made.store)
    refused(2, r"rob train-student .*--epochs 0 .*: Invalid value for '--epochs'", "sweep", out, *words)
    for vary, said in (
        ("student=resnet18,resnt18", "unknown student 'resnt18'"),
        ("objective=dinoo", "did you mean dino"),
    ):
        refused(2, said, "sweep", out, "--vary", vary, *words[2:])
    assert not out.exists()


def test_an_option_that_is_there_twice_is_pointed_out(rob, made, tmp_path):
    sheet = ("inspect", made.data, "--sheet", tmp_path / "sheet.png", "--images", 1)
    assert "--images is there 2 times: the last one counts" in rob(*sheet, "--images=2").out
    assert "there 2 times" not in rob(*sheet, "--overwrite").out
