"""``rob check`` finds what is damaged, in everything that the other commands leave behind."""

import json
import re
import shutil

import pytest


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory):
    """Images, a store and a run with a result, each in its place in one folder."""
    from rob.cli import main

    folder = tmp_path_factory.mktemp("whole")
    for path in (made.data, made.data.with_name("data.beton.json")):
        shutil.copy(path, folder)
    shutil.copytree(made.store, folder / "targets.zarr")
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            ("train-student", *made.train, "--out", folder / "run"),
            ("eval", "knn", folder / "run", made.data, "--device", "cpu", "--workers", 1),
        ):
            patch.setattr("sys.argv", ["rob", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
    return folder


def test_what_is_whole_is_said_to_be(rob, whole):
    outcome = rob("check", whole / "data.beton", whole / "targets.zarr", whole / "run")
    assert outcome.code == 0, outcome.err
    assert re.search(r"data\.beton: 24 images, none damaged\n", outcome.out)
    assert re.search(r"targets\.zarr: 1 chunks, none damaged\n", outcome.out)
    assert re.search(r"run: 6 files, none damaged\n", outcome.out)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("data.beton", r"data\.beton: image \d+ is damaged"),
        ("targets.zarr/embedding/c/0/0/0", r"chunk 0 of array 'embedding' .* is damaged"),
        ("targets.zarr/statistics/embedding_sum/c/0", r"array 'statistics/embedding_sum' is damaged"),
        ("run/student.safetensors", r"student\.safetensors is damaged or was edited"),
        ("run/checkpoint.pt", r"checkpoint\.pt is damaged"),
        ("run/metrics.jsonl", r"metrics\.jsonl: line \d is damaged or was edited"),
        ("run/config.json", r"config\.json is damaged or was edited"),
        ("run/eval/knn.json", r"knn\.json is damaged or was edited"),
    ],
)
def test_what_is_damaged_is_named(refused, whole, tmp_path, file, message):
    there = shutil.copytree(whole, tmp_path / "there")
    flip(there / file)
    refused(1, message, "check", there / "data.beton", there / "targets.zarr", there / "run")


def test_damaged_results_are_found_at_any_depth_and_detections_are_others(rob, whole, tmp_path):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    for name in ("finetune/abc.json", "detections/detect.json"):
        (run / "eval" / name).parent.mkdir()
        (run / "eval" / name).write_text('{"top1": 5}')
    outcome = rob("check", run)
    assert outcome.code == 1
    assert "abc.json" in outcome.err and "detect.json" not in outcome.err


def test_what_others_wrote_into_a_run_is_not_called_damaged(rob, whole, tmp_path):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    for name in ("student.mlpackage/Manifest.json", "wandb/run-1/files/wandb-summary.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # of something else that the run lies in
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    shutil.copytree(whole / "run", tmp_path / "sweep" / "first")
    outcome = rob("check", run, tmp_path / "sweep")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(": 6 files, none damaged\n") == 2


def test_what_is_found_of_images_is_said_drawn_and_written(rob, refused, made, tmp_path):
    data, out, sheet = shutil.copy(made.data, tmp_path), tmp_path / "found.json", tmp_path / "pairs.png"
    shutil.copy(made.data.with_name("data.beton.json"), tmp_path)
    outcome = rob("check", made.data, data, "--out", out, "--sheet", sheet)
    assert outcome.code == 0, outcome.err
    assert re.search(
        rf"{data}: 24 of 24 images are in {made.data}, too, byte for byte: \S+ \(\S+\), .* more\n", outcome.out
    )
    assert "no images are alike: no sheet was drawn" in outcome.out
    found = json.loads(out.read_text())
    assert [entry["images"] for entry in found["data"]] == [24, 24]
    assert [(entry["row"], entry["of_row"]) for entry in found["leaks"][0]["shared"]] == [(i, i) for i in range(24)]
    refused(2, "found.json is there already: pass --overwrite", "check", data, "--out", out)
    refused(2, "--out and --sheet are of the images", "check", data, "--out", sheet, "--checksums-only")
    assert "more than once" not in rob("check", data, "--checksums-only").out


def test_what_is_none_of_ours_is_refused(refused, tmp_path):
    (tmp_path / "notes").mkdir()
    refused(2, "notes: neither packed images, nor a target store, nor a run folder", "check", tmp_path / "notes")
    refused(2, "nowhere", "check", tmp_path / "nowhere")
