"""The report: one file that fetches nothing, in which every name is text, with a sentence where something is missing."""

import base64
import io
import os
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.own_network import OwnNetwork
from rob.common.records import sealed
from rob.common.store.patches import PatchChoice
from rob.common.views.recipes import get_recipe
from rob.student_train.checkpoint import export_weights, hash_student
from rob.student_train.report.config import ReportConfig
from rob.student_train.report.embedding_map import principal
from rob.student_train.report.looks import last_map
from rob.student_train.report.neighbours import nearest
from rob.student_train.report.report import report
from rob.student_train.report.run import read_runs
from rob.student_train.report.shown_images import look_at
from rob.student_train.report.summary import summary
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.tiny import TEACHER as TINY_TEACHER
from support.tiny import tiny_images, tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, log_line

pytest.importorskip("plotly")

HOSTILE = "<script>alert(1)<img src=x>"
"""A class, a run, a student."""
SECTIONS = [
    "runs",
    "settings",
    "training",
    "knn",
    "evaluation",
    "views",
    "neighbours",
    "map",
    "looks",
    "patches",
    "exports",
    "versions",
]
MEASURED = {"by_labels": True, "num_images": 60, "student": 40.0, "random": 30.0, "pixels": 35.0, "teacher": 60.0}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory) -> Path:
    """Two runs on 24 images, made without training: ``cnn`` has everything, the other one weights and settings alone."""
    folder = tmp_path_factory.mktemp("report")
    images = tiny_images(folder / "images", 24)
    (images / "class1").rename(images / HOSTILE)
    pack(PackConfig(source=str(images), out=folder / "data.beton", workers=1))
    data = Beton(folder / "data.beton")
    patches = PatchChoice("grid", patch_dim=8)
    store = tiny_store(folder / "targets.zarr", data, teacher, loader=LOADER, view_size=64, patches=patches)
    for name, student in (("cnn", "test_resnet"), (HOSTILE, "test_vit")):
        torch.manual_seed(0)
        config, out = StudentConfig(student, 32), folder / name
        export_weights(build_student(config), describe_student(config), out / "student.safetensors")
        settings = {
            "student": {"name": student, "image_size": 32}, "objective": {"name": "dino"}, "pairing": {"num_local": 1},
            "data": str(data.path), "seed": 0, "branch": {"seed": 7},
            "targets": str(store.path), "recipe": get_recipe("dino").to_dict(), "versions": {"torch": "1.0"},
            "data_fingerprint": data.manifest.fingerprint,
        }  # fmt: skip
        (out / "config.json").write_bytes(sealed(settings))
    run = folder / "cnn"
    (run / "metrics.jsonl").write_bytes(
        b"".join(log_line(step=n, target_entropy=1.0, mean_target_entropy=2.0) for n in (1, 2))
    )
    (run / "knn.jsonl").write_bytes(b"".join(sealed({"epoch": n, "step": n, **MEASURED}) for n in (1, 2, 2)))
    (run / "outcome.json").write_bytes(sealed(MEASURED))
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_bytes(sealed({"top1": 51.5, "test": HOSTILE}))
    (run / "eval" / "linear.json").write_bytes(sealed({"top1": 87.25, "weights": "of a teacher"}))
    agreement = {
        "images": 9,
        "lowest_cosine": 0.9,
        "mean_cosine": 0.95,
        "neighbours": 0.8,
        "knn": 50.0,
        "knn_torch": 51.0,
    }
    file = {
        "file": "student.onnx", "format": "onnx", "precision": "int8", "bytes": 10**6, "student": HOSTILE,
        "weights": hash_student(run), "input": {}, "output": {}, "runtime": "onnxruntime", "agreement": agreement,
        "checked_on": "", "latency_ms": 1.5, "int8_share": 1.0, "calibration_images": 9, "versions": {},
    }  # fmt: skip
    older = file | {"file": "older.onnx", "weights": "before it was trained on"}
    (run / "export.json").write_bytes(sealed({"files": [file, older]}))
    return folder


@pytest.fixture(scope="module")
def config(folder) -> ReportConfig:
    return ReportConfig(
        (folder / "cnn", folder / HOSTILE), folder / "report.html", device="cpu", loader=LOADER, examples=2
    )


@pytest.fixture(scope="module")
def page(config) -> "Page":
    return Page(report(config).read_text())


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._section, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_data(self, data):
        if self._open != "script":
            self.texts[self._section] = self.texts.get(self._section, "") + data

    def handle_endtag(self, tag):
        self._open = ""


def test_every_section_is_there_and_nothing_is_fetched(page):
    assert list(page.texts)[1:] == SECTIONS
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        for address in (attributes.get("src"), attributes.get("href")):
            assert address is None or address.startswith(("data:image/jpeg;base64,", "#")), address
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    first = next(a["src"] for tag, a in page.tags if tag == "img")
    Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))).verify()


def test_names_are_text(page):
    plots = [a for _, a in page.tags if a.get("class") == "plot"]
    scripts = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert scripts == ["application/json"] * len(plots) + ["application/gzip", None]
    for name in ("runs", "settings", "views", "neighbours", "looks", "versions"):
        assert HOSTILE in page.texts[name]


def test_what_a_run_has_is_shown(page):
    assert "51.50" in page.texts["evaluation"]
    assert "student.onnx" in page.texts["exports"]
    assert "older.onnx" not in page.texts["exports"]
    assert "87.25" not in page.texts["evaluation"]
    assert "cnn: linear left out, measured on other weights" in page.texts["evaluation"]
    assert "teacher" in page.texts["neighbours"]
    assert "attention" in page.texts["looks"]
    assert "activation" in page.texts["looks"]
    assert "seed 7, of run" in page.texts["views"]  # that of the views, not of the training
    assert page.texts["views"].count("local ") == 2  # the run's one of each image, not the recipe's
    assert TINY_TEACHER in page.texts["patches"]
    assert "cnn" in page.texts["patches"]
    assert page.texts["settings"].index("student.name") < page.texts["settings"].index("All ")
    assert "seed" not in page.texts["settings"].partition("All ")[0]  # the same in both


def test_what_a_run_has_not_is_a_sentence_with_the_command(page, config, folder, tmp_path):
    for name, command in (("knn", "--knn-every"), ("evaluation", "rob eval knn"), ("exports", "rob export")):
        assert command in page.texts[name]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes(sealed({"data": str(tmp_path / "gone.beton")}))
    bare = Page(report(replace(config, runs=(begun,), out=tmp_path / "bare.html")).read_text())
    assert list(bare.texts)[1:] == SECTIONS
    assert "rob train-student" in bare.texts["runs"]
    assert "--data DATA.beton" in bare.texts["views"]
    assert not [tag for tag, a in bare.tags if a.get("class") == "plot"], "a plot of nothing"


def test_runs_that_were_measured_differently_have_a_caption_each(folder):
    (run,) = read_runs([folder / "cnn"])
    assert run.outcome is not None
    other = replace(run, name="other", outcome=replace(run.outcome, by_labels=False, by_rank=True))
    both, alone = str(summary([run, other])), str(summary([run]))
    assert "columns of cnn are k-NN top-1" in both and "columns of other are RankMe" in both
    assert "not to be compared by these columns" in both
    assert "columns are k-NN top-1" in alone and "by these columns" not in alone


def test_two_teachers_of_one_architecture_are_told_apart(config, folder, tmp_path):
    data, (run,) = Beton(folder / "data.beton"), read_runs([folder / "cnn"])
    other = tiny_store(tmp_path / "other.zarr", data, tiny_teacher_checkpoint(tmp_path, seed=5), loader=LOADER)
    run = replace(run, settings={**run.settings, "targets": [run.settings["targets"], str(other.path)]})
    images = look_at(data, [run], config, torch.device("cpu"), lambda: None)
    assert list(images.teachers) == [TINY_TEACHER, f"{TINY_TEACHER} ({other.manifest.weights_hash[:8]})"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("report.pdf")}, "the report is HTML, name it"),
        ({"runs": (Path("nowhere"),)}, "nowhere: no such folder"),
        ({"runs": ("cnn", "cnn")}, "is given twice"),
        ({"runs": ("images",)}, "has no config.json"),
        ({"data": "other.beton"}, "holds other images than the run was trained on"),
        ({"test": "gone.beton"}, "gone.beton"),
        ({"out": "data.beton.html"}, "is there already"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(changes, message, config, folder, tmp_path):
    if "other.beton" in changes.values():
        pack(PackConfig(source=str(tiny_images(tmp_path / "x", 4)), out=folder / "other.beton", workers=1))
    (folder / "data.beton.html").touch()
    here = {
        name: tuple(folder / one for one in value) if isinstance(value, tuple) else folder / value
        for name, value in changes.items()
    }
    out = tmp_path / "report.html"
    with pytest.raises(MisuseError, match=message):
        report(replace(config, **{"out": out, **here}))
    assert not out.exists()


def test_nearest_is_another_image_and_principal_holds_the_variance():
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2]]), dim=1)
    assert nearest(rows, 1)[0][:, 0].tolist() == [1, 0, 3, 2]
    plane = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 5)
    places, shares = principal(plane)
    assert sum(shares) == pytest.approx(1)
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(plane, plane), rtol=1e-3, atol=1e-3)


def test_attention_is_a_share_and_activation_is_where_something_is():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :16] = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    kind, places = last_map(build_student(StudentConfig("test_vit", 32)).eval(), images)
    assert (kind, places.shape) == ("attention", (1, 8, 8))
    assert 0.5 < places.sum() < 1  # the rest is the class token's
    kind, places = last_map(build_student(StudentConfig("test_resnet", 32)).eval(), images)
    assert (kind, places.shape) == ("activation", (1, 4, 4))
    assert np.isfinite(places.numpy()).all()
    attends_to_channels = build_student(StudentConfig("xcit_nano_12_p16_224", 224)).eval()
    assert last_map(attends_to_channels, torch.zeros(1, 3, 224, 224)) is None
    pooled = OwnNetwork(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), None, 32, "a student", "student"
    )
    assert last_map(pooled.eval(), images) is None  # returns features, no map


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: Debian's package chromium has one")
def test_a_browser_draws_every_plot_without_a_complaint(page, config, tmp_path):
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    words += ["--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom", config.out.as_uri()]
    seen = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(tmp_path)})
    assert "CONSOLE" not in seen.stderr, seen.stderr
    plots = sum(a.get("class") == "plot" for _, a in page.tags)
    assert f'data-drawn="{plots}"' in seen.stdout
    drawn = Page(seen.stdout)
    assert sum("main-svg" in (a.get("class") or "") for tag, a in drawn.tags if tag == "svg") >= plots > 5
