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


def test_pack_without_images(refused, made, tmp_path):
    out = tmp_path / "out.beton"
    refused(2, "nowhere: no such file or folder; SOURCE is a folder", "pack", tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    refused(2, "empty: the folder is empty", "pack", tmp_path / "empty", out)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    refused(2, r"texts: no image in it or below; looked for \.jpg", "pack", tmp_path / "texts", out)
    refused(2, "data set 'cifar11': did you mean cifar10", "pack", "cifar11", out)
    refused(2, "a folder; name the file to write", "pack", made.images, tmp_path)


def test_pack_with_a_broken_image(refused, made, tmp_path):
    folder = shutil.copytree(made.images, tmp_path / "images")
    path = folder / "class1" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    refused(1, r"broken image .*class1/00001\.jpg: .*--skip-bad", "pack", folder, tmp_path / "out.beton")


def test_a_data_set_that_is_missing_or_truncated(refused, made, tmp_path):
    nowhere, cut, alone = (tmp_path / f"{name}.beton" for name in ("nowhere", "cut", "alone"))
    cut.write_bytes(made.data.read_bytes()[:-100])
    shutil.copy(manifest_path(made.data), manifest_path(cut))
    shutil.copy(made.data, alone)
    for command, arguments in [("cache-teacher", (tmp_path / "t.zarr", *made.cache)), ("train-student", ())]:
        for data, message in [
            (nowhere, r"nowhere\.beton: no such file; .* rob pack"),
            (cut, r"cut\.beton: truncated or damaged: [\d,]+ bytes, not"),
            (alone, r"alone\.beton\.json: missing"),
            (made.images / "class0" / "00000.jpg", "not a packed data set"),
        ]:
            rest = arguments or (*made.train[1:], "--out", tmp_path / "run")
            refused(2, message, command, data, *rest)
