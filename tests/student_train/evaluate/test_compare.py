"""rob compare: scores by task, costs that are what they say, one plot."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from rob import cli
from rob.common import screen
from rob.common.errors import MisuseError
from rob.student_train.checkpoint import export_weights
from rob.student_train.commands.compare import compare as compare_command
from rob.student_train.evaluate.compare import (
    headline,
    latency_ms,
    names_of,
    summarise,
    write_comparison,
)
from rob.student_train.evaluate.compare_plot import compare_plot, numbered
from rob.student_train.evaluate.results import not_comparable, read_results, write_result
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.training import log_line


def make_run(folder: Path, name: str, size: int) -> Path:
    config = StudentConfig(name, size)
    export_weights(build_student(config), describe_student(config), folder / "student.safetensors")
    return folder


@pytest.mark.parametrize("count", [1, 5])
def test_nothing_of_the_plot_is_cut_or_covered(count):
    names = [f"run-{'long-' * 6}{n} (test_resnet, 32 px)" for n in range(count)]
    params = [0.37 * 2 ** (n // 2) for n in range(count)]
    costs = {"parameters, M": params, "MACs, M": params, "CUDA latency, ms": [None] * count}
    scores = {"knn": [60.0 + n for n in range(count)], "knn-random": [30.0, *[None] * (count - 1)]}
    figure = compare_plot(names, costs, scores)
    figure.canvas.draw()
    panel, _ = figure.axes  # none for a cost that nobody has
    numbers = [text for text in panel.texts]
    assert [text.get_text() for text in numbers] == (["1"] if count == 1 else ["1, 2", "3, 4", "5"])
    for text in [*numbers, *(label for legend in figure.legends for label in legend.get_texts()), panel.xaxis.label]:
        box, whole = text.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    named = [label.get_text() for label in figure.legends[1].get_texts()]
    assert named == [f"{n}  {name}" for n, name in enumerate(names, 1)]
    low, high = panel.get_xlim()
    shown = [label for label in panel.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert any(label.get_text() for label in shown)
    for left, right in pairwise(label.get_window_extent() for label in shown):
        assert left.x1 < right.x0


def test_runs_that_score_alike_share_a_number_in_the_plot_and_names_are_short():
    assert numbered([1.0, 1.01, 1.0, 2.0, None], [50.0, 50.2, 60.0, 50.0, 9.0], close=0.5) == [
        (1.0, 50.0, [1, 2]),
        (1.0, 60.0, [3]),
        (2.0, 50.0, [4]),
    ]
    assert names_of(["runs/a", "other/b"]) == ["a", "b"]
    assert names_of(["runs/cnn/dino/0", "runs/cnn/moco/0", "runs/vit/dino/0"]) == [
        "cnn/dino/0",
        "cnn/moco/0",
        "vit/dino/0",
    ]
    assert names_of(["s3://mine/runs/a", "s3://mine/old/a"]) == ["runs/a", "old/a"]


def test_more_runs_than_columns_are_rows(tmp_path, monkeypatch, capsys):
    made = make_run(tmp_path / "r0", "test_resnet", 32)
    write_result(made, "knn", {"top1": 61.25, "test_fingerprint": "abc"})
    monkeypatch.setattr(screen.console, "_width", 120)
    runs = [made, *(Path(shutil.copytree(made, tmp_path / f"r{n}")) for n in range(1, 5))]
    compare_command(runs, tmp_path / "a.png")
    lines = capsys.readouterr().out.splitlines()
    assert sum(any(f" r{n} " in line and "61.25" in line for line in lines) for n in range(5)) == 5


def test_the_table_and_the_plot(tmp_path, monkeypatch, capsys):
    first, second = make_run(tmp_path / "first", "test_resnet", 32), make_run(tmp_path / "second", "test_vit", 32)
    write_result(first, "knn", {"top1": 61.25, "test_fingerprint": "abc"})
    shots = [{"labels": "1 %", "mean": 33.5}, {"labels": "10 %", "mean": 47.0}]
    write_result(first, "lowshot", {"results": shots, "test_fingerprint": "abc"})
    write_result(second, "knn", {"top1": 58.5, "test_fingerprint": "xyz"})
    write_result(second, "knn-random", {"top1": 20.5, "test_fingerprint": "xyz"})
    write_result(second, "detect", {"box": {"ap": 12.5}, "mask": None})
    write_result(second, "segment", {"miou": 0.0})
    lines = b"".join(log_line(images_per_second=speed) for speed in (100.0, 300.0, 200.0))
    (first / "metrics.jsonl").write_bytes(lines + b'{"cut')

    out = tmp_path / "plot.png"
    monkeypatch.setattr(screen.console, "_width", 250)
    monkeypatch.setattr(sys, "argv", ["rob", "compare", str(first), str(second), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    text = capsys.readouterr().out
    for expected in ("61.25", "33.50", "47.00", "58.50", "12.50", "detect box AP", "segment mIoU", "200.00"):
        assert expected in text
    assert text.index("knn %") < text.index("knn-random %") < text.index("lowshot 1 %")  # a task, then its controls
    assert "knn: first and second differ in their test images: do not compare them" in text
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400
        assert len(image.convert("L").getcolors()) > 10
    rows = json.loads(out.with_suffix(".json").read_text())
    assert rows[0]["scores"] == {"knn": 61.25, "lowshot 1 %": 33.5, "lowshot 10 %": 47.0}
    assert rows[0]["train_images_per_second"] == 200
    assert rows[1]["train_images_per_second"] is None


def test_costs_are_those_of_the_network(tmp_path):
    run = make_run(tmp_path / "run", "test_resnet", 32)
    threads = torch.get_num_threads()
    summary = summarise(run)
    assert torch.get_num_threads() == threads
    model = build_student(StudentConfig("test_resnet", 32))
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    macs = []

    def count(module, _, output):
        if isinstance(module, nn.Conv2d):
            macs.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert summary.macs == sum(macs)


def test_latency_is_the_time_of_one_image_on_one_thread():
    seen = []

    class Sleeps(nn.Module):
        def forward(self, images):
            seen.append((tuple(images.shape), torch.get_num_threads()))
            torch.zeros(200_000).sort()
            return images

    assert 0.05 < latency_ms(Sleeps(), 8, torch.device("cpu")) < 5000
    assert set(seen) == {((1, 3, 8, 8), 1)}


def test_what_stands_for_a_result():
    assert headline("transfer-cifar10", {"top1": 5.0, "top5": 9.0}) == {"transfer-cifar10": 5.0}
    assert headline("detect", {"box": {"ap": 1.0}, "mask": {"ap": 2.0}}) == {
        "detect box AP": 1.0,
        "detect mask AP": 2.0,
    }
    assert headline("segment", {"miou": 0.0, "pixel_accuracy": 9.0}) == {"segment mIoU": 0.0}
    assert headline("detect", {"box": {"ap": None}, "mask": None}) == {}  # there was nothing to find


def test_results_of_other_images_or_another_k_are_not_compared():
    first = {"top1": 1.0, "k": 20, "train_fingerprint": "a", "test_fingerprint": "t"}
    told = {name: not_comparable({"x": {"knn": first}, "y": {"knn": {**first, name: "other"}}}) for name in first}
    assert told == {
        "top1": [],
        "k": ["knn: x and y differ in their k: do not compare them"],
        "train_fingerprint": ["knn: x and y differ in their training images: do not compare them"],
        "test_fingerprint": ["knn: x and y differ in their test images: do not compare them"],
    }
    assert not not_comparable({"x": {"knn": first}, "y": {"linear": {**first, "k": 9}}, "z": {}})


def test_runs_that_cannot_be_compared(tmp_path):
    run = make_run(tmp_path / "run", "test_resnet", 32)
    with pytest.raises(MisuseError, match="none of these runs has been evaluated"):
        write_comparison([summarise(run)], tmp_path / "plot.png")
    write_result(run, "knn", {})
    (run / "eval" / "knn.json").write_text("{")
    with pytest.raises(MisuseError, match=r"knn\.json is cut or no JSON: delete it and evaluate again"):
        read_results(run)
    with pytest.raises(MisuseError, match="no such file"):
        summarise(tmp_path / "nowhere")


def test_results_of_other_weights_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", "test_resnet", 32)
    weights = summarise(run).weights
    write_result(run, "knn", {"top1": 61.25, "weights": weights})
    write_result(run, "knn-random", {"top1": 20.5, "weights": "of a random start"})
    write_result(run, "linear", {"top1": 70.5})  # of an older rob, which did not say
    write_result(
        run, "lowshot", {"results": [{"labels": "1%", "mean": 9.5}], "weights": "of the run before it went on"}
    )
    shown = summarise(run)
    assert shown.scores == {"knn": 61.25, "knn-random": 20.5, "linear": 70.5}
    assert shown.left_out == ["lowshot"]
    monkeypatch.chdir(tmp_path)
    compare_command([run])
    assert "run: lowshot left out, measured on other weights" in " ".join(capsys.readouterr().out.split())


def test_the_numbers_beside_the_plot_are_not_written_over(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "test_resnet", 32)
    write_result(run, "knn", {"top1": 61.25})
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(MisuseError, match=r"package\.json is there already"):
        compare_command([run], tmp_path / "package.png")
    assert not (tmp_path / "package.png").exists()


def test_exported_files_of_these_weights_are_shown(tmp_path):
    run = make_run(tmp_path / "run", "test_resnet", 32)
    export(ExportConfig(run, ("torch",)))
    (entry,) = summarise(run).exports.values()
    assert (entry.file, entry.bytes) == ("student.pt2", (run / "student.pt2").stat().st_size)
    assert entry.score == pytest.approx(1.0)
    make_run(run, "test_resnet", 32)  # trained anew: the file is of other weights
    assert summarise(run).exports == {}
