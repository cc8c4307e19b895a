"""``sweep``: every cell of the grid once, one a GPU, and a picture."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, Lock, Thread
from time import sleep
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rob.cli import main
from rob.common.errors import FailureError, MisuseError
from rob.common.files import lock_file, wait_for_lock
from rob.common.images.beton import Beton
from rob.common.records import sealed
from rob.common.views.recipes import get_recipe
from rob.student_train import sweep as sweep_module
from rob.student_train.sweep import (
    SweepConfig,
    SweepRow,
    Variation,
    draw_heat_map,
    heat_map,
    is_finished,
    sweep,
    visible_gpus,
)
from support.packing import packed
from support.tiny import tiny_beton, tiny_images, tiny_store, tiny_teacher_checkpoint
from support.training import log_line

SIZES, SCALES = Variation.parse("local-size=16,24"), Variation.parse("--local-scale=0.05 0.14, 0.05 0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(tiny_beton(tmp_path_factory.mktemp("images"), 4).path)


class Commands(list[list[str]]):
    """What the processes are told; ``gpus`` has the CUDA_VISIBLE_DEVICES of each."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.gpus: list[str | None] = []
        self.meanwhile: Callable[[], Any] = lambda: None  # called while a process runs


@pytest.fixture
def commands(monkeypatch) -> Commands:
    """Instead of processes: notes each command and its environment, and leaves behind what the real one leaves."""
    seen = Commands()

    def run(_, command, log, environment) -> bool:
        arguments = command[3:]
        with seen.lock:  # runs may be threads
            seen.append(arguments)
            seen.gpus.append(environment.get("CUDA_VISIBLE_DEVICES"))
        seen.meanwhile()
        if "--fail" in arguments or ("24" in arguments and "--fail-24" in arguments):
            return False
        if arguments[0] == "train-student":
            folder = sweep_module.Path(arguments[arguments.index("--out") + 1])
            size = int(arguments[arguments.index("--local-size") + 1])
            (folder / "metrics.jsonl").write_bytes(log_line(loss=2.0) + log_line(loss=16 / size))
            (folder / "student.safetensors").touch()
        else:
            folder = sweep_module.Path(arguments[2])
            (folder / "eval").mkdir(exist_ok=True)
            (folder / "eval" / "knn.json").write_bytes(sealed({"top1": 40.0 + len(seen)}))
        return True

    monkeypatch.setattr(sweep_module.Processes, "run", run)
    return seen


def test_every_combination_is_trained_and_measured(tmp_path, data, commands):
    config = SweepConfig(tmp_path, (data, "--epochs", "2"), (SIZES, SCALES), Path(data), "cpu")
    rows = sweep(config)
    assert [row.values for row in rows] == [(s, c) for s in ("16", "24") for c in ("0.05 0.14", "0.05 0.3")]
    assert [row.loss for row in rows] == [1.0, 1.0, 16 / 24, 16 / 24]
    train, knn = commands[:2]
    assert train[:4] == ["train-student", data, "--epochs", "2"]
    assert train[4:9] == ["--local-size", "16", "--local-scale", "0.05", "0.14"]
    assert knn[:4] == ["eval", "knn", train[train.index("--out") + 1], data]
    assert knn[knn.index("--test") + 1] == data
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert table[3] == {"local-size": "24", "local-scale": "0.05 0.3", "loss": 16 / 24, "knn_top1": rows[3].knn_top1}


def test_finished_runs_are_not_made_again(tmp_path, data, commands):
    sweep(SweepConfig(tmp_path, (data,), (Variation("local-size", ("16",)),), device="cpu"))
    before = len(commands)
    rows = sweep(SweepConfig(tmp_path, (data,), (SIZES,), device="cpu"))
    assert len(commands) == before + 2  # one value more: its training and its k-NN
    assert len(rows) == 2


@pytest.mark.parametrize("damage", [b'{"made_with": {}}', b"[]", b"\x00", None])
def test_a_damaged_record_has_its_run_made_again(tmp_path, data, commands, damage):
    config = SweepConfig(tmp_path, (data,), (SIZES,), device="cpu")
    rows = sweep(config)
    record, before = config.folder(("16",)) / "sweep.json", len(commands)
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 1
    record.write_bytes(bytes(content) if damage is None else damage)
    assert [row.loss for row in sweep(config)] == [row.loss for row in rows]
    assert len(commands) == before + 2


def test_the_result_of_another_sweep_is_refused(tmp_path, data, commands):
    config = SweepConfig(tmp_path / "out", (data, "--epochs", "2"), (SIZES,), device="cpu")
    rows = sweep(config)
    (config.folder(("16",)) / "eval" / "knn.json").write_bytes(
        sealed({"top1": 0.0})
    )  # measured on something else since
    elsewhere = shutil.copytree(Path(data).parent, tmp_path / "elsewhere") / Path(data).name
    moved = (str(elsewhere), "--workers", "1", "--epochs", "2")
    assert sweep(replace(config, device="auto", arguments=moved)) == rows
    other = tiny_beton(tmp_path, 4, seed=1).path
    before = len(commands)
    for changed, what in (
        (replace(config, arguments=(data, "--epochs", "3")), "--epochs 2 --local-size 16, and .* --epochs 3"),
        (replace(config, test=other), f"test = None, and this one has {Beton(other).manifest.fingerprint}"),
    ):
        with pytest.raises(MisuseError, match=f"local-size=16 has the result of another sweep, .*{what}.*another OUT"):
            sweep(changed)
    assert len(commands) == before
    config = replace(config, test=other)
    sweep(replace(config, out=tmp_path / "second"))
    tiny_beton(tmp_path / "again", 5, seed=1).path.replace(other)
    (tmp_path / "again" / "images-1.beton.json").replace(f"{other}.json")
    with pytest.raises(MisuseError, match="with test = "):
        sweep(replace(config, out=tmp_path / "second"))


def test_other_targets_at_the_same_place_are_refused(tmp_path, data, commands):
    """The words are the same, the manifest tells."""
    place, images = tmp_path / "targets.zarr", Beton(data)
    teachers = [tiny_teacher_checkpoint(tmp_path, seed) for seed in (0, 1)]
    tiny_store(place, images, teachers[0])
    config = SweepConfig(tmp_path / "out", (data, "--targets", str(place)), (SIZES,), device="cpu")
    rows, before = sweep(config), len(commands)
    assert sweep(config) == rows
    for teacher, changes, what in (
        (teachers[1], {}, "targets.weights_hash = "),
        (teachers[0], {"recipe": get_recipe("moco-v2")}, "targets.recipe.name = dino, and this one has moco-v2:"),
        (teachers[0], {"prototypes": 2}, "targets.head = .* fitted"),
    ):
        shutil.rmtree(place)
        tiny_store(place, images, teacher, **changes)
        with pytest.raises(MisuseError, match=f"local-size=16 has the result of another sweep, with {what}"):
            sweep(config)
    shutil.rmtree(place)
    with pytest.raises(MisuseError, match="no target store"):
        sweep(config)
    assert len(commands) == before
    tiny_store(place, images, teachers[0])
    assert sweep(config) == rows  # cached again, to the same targets


def test_images_that_are_missing_or_without_labels_are_misuse_before_any_training(tmp_path, data, commands):
    with pytest.raises(MisuseError, match="no-such"):
        sweep(SweepConfig(tmp_path / "out", (data,), (SIZES,), tmp_path / "no-such.beton", device="cpu"))
    flat = packed(tiny_images(tmp_path / "images", 4, classes=1) / "class0", tmp_path).path
    with pytest.raises(MisuseError, match="has no labels"):
        sweep(SweepConfig(tmp_path / "out", (str(flat),), (SIZES,), device="cpu"))
    assert not commands


def test_gpus_are_handed_out_by_the_names_they_have_here(monkeypatch):
    monkeypatch.setattr(sweep_module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == ["2", "3"]


def test_every_gpu_has_one_run_at_a_time(tmp_path, data, commands, monkeypatch):
    monkeypatch.setattr(sweep_module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    # Broken, which is an error, unless two processes are there at once; a third would be left over and wait in vain.
    commands.meanwhile = Barrier(2, timeout=20).wait
    sizes = Variation("local-size", ("16", "24", "32", "48"))
    config = SweepConfig(tmp_path / "out", (data,), (sizes,), device="auto")
    sweep(config)
    assert len(commands) == 8
    seen = dict(zip(map(tuple, commands), commands.gpus, strict=True))
    runs = [[seen[tuple(command[3:])] for command in config.commands(cell)] for cell in config.cells()]
    assert all(train == measure for train, measure in runs)  # a run stays where it is
    assert sorted(commands.gpus) == ["2"] * 4 + ["GPU-5f"] * 4
    # Two by two they meet at the barrier: never both on one GPU.
    assert all(set(commands.gpus[n : n + 2]) == {"2", "GPU-5f"} for n in range(0, 8, 2))


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 2), ("cuda:1", 2), ("auto", 0)])
def test_one_run_at_a_time_where_the_device_is_told_or_there_is_no_gpu(
    tmp_path, data, commands, monkeypatch, device, gpus
):
    monkeypatch.setattr(sweep_module.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone = Lock()

    def meanwhile() -> None:
        assert alone.acquire(blocking=False)
        sleep(0.01)
        alone.release()

    commands.meanwhile = meanwhile
    sweep(SweepConfig(tmp_path, (data,), (SIZES,), device=device))
    assert commands.gpus == [None] * 4
    assert all(command[command.index("--device") + 1] == device for command in commands)


def test_a_failed_run_is_named_and_the_others_are_made(tmp_path, data, commands):
    config = SweepConfig(tmp_path, (data, "--fail-24"), (SIZES,), device="cpu")
    with pytest.raises(
        FailureError, match=r"1 of 2 .*24/sweep.log \(the first ends with: .*\); .* others are in .*sweep.json"
    ):
        sweep(config)
    assert is_finished(config, ("16",))
    assert "local-size 24" in (config.folder(("24",)) / "sweep.log").read_text()
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 1


def test_a_run_whose_log_is_gone_is_a_sentence(tmp_path, data, commands):
    config = SweepConfig(tmp_path, (data,), (SIZES,), device="cpu")
    commands.meanwhile = lambda: [log.unlink() for log in tmp_path.rglob("metrics.jsonl")]
    with pytest.raises(FailureError, match=r"local-size=16 was moved or deleted while its run went on: run the sweep"):
        sweep(config)


def shown(config: SweepConfig, rows: list[SweepRow], png: Path) -> tuple[list, list[str], list[str], np.ndarray]:
    """Of the drawn heat map: (row, column, text) of every label in a cell, the tick labels down and across, and the colour
    that each cell has in the PNG, (down, across, 3) uint8."""
    figure = heat_map(config, rows)
    draw_heat_map(config, rows, png)
    with Image.open(png) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    (axes,) = figure.axes
    figure.canvas.draw()
    texts = [(text.get_position()[1], text.get_position()[0], text.get_text()) for text in axes.texts]
    down, across = ([tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    # Near a corner, beside the text.
    places = [[axes.transData.transform((j + 0.45, i + 0.4)) for j in range(len(across))] for i in range(len(down))]
    colours = [[pixels[len(pixels) - 1 - int(y), int(x)] for x, y in row] for row in places]
    assert (axes.get_ylabel(), axes.get_title()) == (config.variations[0].option, "k-NN top-1, %")
    assert axes.get_xlabel() == (config.variations[1].option if len(config.variations) > 1 else "")
    return texts, down, across, np.array(colours)


def test_heat_map(tmp_path):
    config = SweepConfig(tmp_path, ("data.beton",), (SIZES, SCALES))
    rows = [SweepRow(cell, 1.0, 50.0 + n) for n, cell in enumerate(config.cells())]
    texts, down, across, colours = shown(config, rows[:3], tmp_path / "map.png")  # one run is missing
    assert texts == [(0, 0, "50.0"), (0, 1, "51.0"), (1, 0, "52.0")]
    assert (down, across) == (["16", "24"], ["0.05 0.14", "0.05 0.3"])
    brightness = colours.astype(int).sum(2)
    assert brightness[0, 0] > brightness[0, 1] > brightness[1, 0]  # better is darker
    assert (colours[1, 1] == 255).all()
    assert brightness[0, 0] < 3 * 255  # the worst is not blank


def test_heat_map_of_one_option_and_of_three(tmp_path):
    one = SweepConfig(tmp_path, ("data.beton",), (SIZES,))
    texts, down, across, colours = shown(one, [SweepRow(("16",), 1.0, 50.0)], tmp_path / "one.png")
    assert (texts, down, across) == ([(0, 0, "50.0")], ["16", "24"], [""])
    assert (colours[0, 0] < 255).any()
    three = SweepConfig(tmp_path, ("data.beton",), (SIZES, SCALES, Variation("lr", ("1", "2"))))
    rows = [SweepRow(cell, 1.0, 50.0 + (3 * n) % 8) for n, cell in enumerate(three.cells())]  # 50 53 56 51 54 57 52 55
    texts, *_ = shown(three, rows, tmp_path / "three.png")
    assert texts == [(0, 0, "53.0"), (0, 1, "56.0"), (1, 0, "57.0"), (1, 1, "55.0")]


@pytest.mark.slow
def test_the_command_with_real_processes(tmp_path, monkeypatch, capsys):
    images = tiny_beton(tmp_path, 32)
    store = tiny_store(tmp_path / "targets.zarr", images, tiny_teacher_checkpoint(tmp_path))
    student = ("--student", "test_resnet", "--no-small-images", "--image-size", "32", "--hidden-dim", "16")
    training = (images.path, "--targets", store.path, *student, "--epochs", "1", "--batch-size", "8", "--workers", "1")
    out = tmp_path / "out"

    def rob_sweep(*vary: str) -> tuple[int, str, str]:
        options = [word for text in vary for word in ("--vary", text)]
        monkeypatch.setattr(
            sys, "argv", ["rob", "sweep", *map(str, (out, *options, "--device", "cpu", "--", *training))]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    code, printed, _ = rob_sweep("head-norm=no")
    folder = out / "head-norm=no"
    assert code == 0, (folder / "sweep.log").read_text()
    (row,) = json.loads((out / "sweep.json").read_text())
    assert row["head-norm"] == "no"
    assert json.loads((folder / "config.json").read_text())["objective"]["head_norm"] is False
    assert json.loads((folder / "eval" / "knn.json").read_text())["top1"] == row["knn_top1"]
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert ["no", f"{row['loss']:.4f}", f"{row['knn_top1']:.2f}"] in table
    with Image.open(out / "sweep.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20  # text and cells

    code, _, error = rob_sweep("head-norm=yes,2")
    assert code == 2
    assert error == "error: --vary 'head-norm=yes,2': --head-norm is a flag, '2' is neither yes nor no\n"

    code, _, error = rob_sweep("local-sise=16,24")
    assert code == 2
    assert error.startswith("error: unknown option of rob train-student 'local-sise': did you mean local-size")


def long_sweep(tmp_path: Path, out: Path) -> list[str]:
    """The words of a sweep whose trainings take long."""
    images = tiny_beton(tmp_path, 32)
    store = tiny_store(tmp_path / "targets.zarr", images, tiny_teacher_checkpoint(tmp_path))
    student = ("--student", "test_resnet", "--no-small-images", "--image-size", "32", "--hidden-dim", "16")
    training = (
        images.path,
        "--targets",
        store.path,
        *student,
        "--epochs",
        "10000",
        "--batch-size",
        "8",
        "--workers",
        "1",
    )
    words = (sys.executable, "-m", "rob", "sweep", out, "--vary", "seed=1,2", "--device", "cpu", "--", *training)
    return list(map(str, words))


NEVER = Event()


def wait_for(path: Path, ended: Event = NEVER) -> None:
    """Until something is in it, or the event."""
    for _ in range(600):
        if ended.is_set() or (path.exists() and path.read_bytes()):
            return
        sleep(0.1)
    raise AssertionError(f"nothing is in {path} after a minute")


def is_free(lock: Path) -> bool:
    try:
        os.close(lock_file(lock, "held"))
    except MisuseError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_sweep_takes_its_run_with_it_which_saves(tmp_path):
    """As an orphan it would train on, and another sweep would find its folder taken."""
    run = tmp_path / "out" / "seed=1"
    with subprocess.Popen(long_sweep(tmp_path, tmp_path / "out"), stdout=subprocess.DEVNULL) as process:
        wait_for(run / "metrics.jsonl")
        process.kill()
    wait_for_lock(run / ".lock", 30)
    assert is_free(run / ".lock")
    assert (run / "checkpoint.pt").exists()
    assert re.search(r"stopped at step \d+ of \d+", (run / "sweep.log").read_text())


@pytest.mark.slow
def test_a_stopped_sweep_stops_its_run_which_saves(tmp_path, monkeypatch, capsys):
    out, over = tmp_path / "out", Event()

    def stop() -> None:
        wait_for(out / "seed=1" / "metrics.jsonl", over)
        if not over.is_set():  # else it would be another test that is stopped
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", long_sweep(tmp_path, out)[2:])
    stopping = Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        over.set()
        stopping.join()
    assert ended.value.code == 143
    assert "stopped: run the same command again to go on from there" in capsys.readouterr().out
    log = (out / "seed=1" / "sweep.log").read_text()
    assert re.search(r"stopped at step \d+ of \d+", log), log
    assert (out / "seed=1" / "checkpoint.pt").exists()
    assert not (out / "seed=2").exists()
    os.close(lock_file(out / "seed=1" / ".lock", "the run still trains"))


def test_an_objective_is_known_to_the_command_alone(tmp_path):
    """In a process of its own: here other tests have read what fills in the names."""
    words = ["--vary", "objective=embedding,nonsense", "--", str(tmp_path / "a.beton"), "--targets", "momentum"]
    done = subprocess.run(
        [sys.executable, "-m", "rob", "sweep", tmp_path / "out", *words], capture_output=True, text=True
    )
    assert "unknown objective 'nonsense'" in done.stderr
