"""``rob pack``: what is listed, kept in order, shown as it is, and refused."""

import os
import shutil
import subprocess
import sys

from rob.common.images.beton import Beton, manifest_path


def test_skipped_images_are_listed(rob, made, tmp_path):
    folder = shutil.copytree(made.images, tmp_path / "images")
    (folder / "class0" / "[broken].jpg").write_bytes(b"no image")
    outcome = rob("pack", folder, tmp_path / "data.beton", "--skip-bad")
    assert outcome.code == 0
    assert "skipped class0/[broken].jpg: broken" in outcome.out
    assert Beton(tmp_path / "data.beton").num_images == 24


def test_names_of_classes_and_files_are_shown_as_they_are(rob, made, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(made.images / "class0", folder / "[red]")
    shutil.copytree(made.images / "class1", folder / "[bold]")
    assert rob("pack", folder, tmp_path / "data.beton").code == 0
    outcome = rob("inspect", tmp_path / "data.beton")
    assert outcome.code == 0, outcome.err
    assert "[bold], [red]" in outcome.out


def test_a_name_that_is_not_of_the_encoding_is_escaped(made, tmp_path):
    folder = shutil.copytree(made.images, tmp_path / "images")
    (folder / "class0" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    command = ("pack", str(folder), str(tmp_path / "data.beton"), "--skip-bad")
    done = subprocess.run(
        [sys.executable, "-c", "from rob.cli import main; main()", *command],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"skipped class0/caf\udce9.jpg: broken" in done.stdout


def test_rows_keep_the_folders_order_where_asked(rob, made, tmp_path):
    assert rob("pack", made.images, tmp_path / "kept.beton", "--keep-order").code == 0
    kept, shuffled = Beton(tmp_path / "kept.beton").manifest.paths, Beton(made.data).manifest.paths
    assert list(kept) == sorted(shuffled) != list(shuffled)


def test_pack_with_a_broken_image(refused, made, tmp_path):
    folder = shutil.copytree(made.images, tmp_path / "images")
    path = folder / "class1" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    refused(1, r"broken image .*class1/00001\.jpg: .*--skip-bad", "pack", folder, tmp_path / "out.beton")


def test_a_data_set_that_is_missing_or_truncated(refused, made, tmp_path):
    nowhere, cut = tmp_path / "nowhere.beton", tmp_path / "cut.beton"
    cut.write_bytes(made.data.read_bytes()[:-100])
    shutil.copy(manifest_path(made.data), manifest_path(cut))
    missing = r"nowhere\.beton: no such file; .* rob pack"
    refused(2, missing, "cache-teacher", nowhere, tmp_path / "t.zarr", *made.cache)
    truncated = r"cut\.beton: truncated or damaged: [\d,]+ bytes, not"
    refused(2, truncated, "train-student", cut, *made.train[1:], "--out", tmp_path / "run")
