"""The command line: the whole main job, help that is instant, and one sentence for everything that cannot be."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rob import cli
from rob.common.images.beton import Beton, manifest_path
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from rob.common.views import loader
from rob.student_train.checkpoint import load_student
from rob.student_train.train import Trainer
from support.tiny import TEACHER, tiny_images, tiny_teacher_checkpoint

COMMANDS = [
    "",
    "pack",
    "cache-teacher",
    "train-student",
    "eval",
    "eval knn",
    "eval linear",
    "eval lowshot",
    "eval transfer",
    "eval detect",
    "compare",
    "sweep",
    "views",
    "inspect",
    "verify",
    "demo",
    "bench",
    "teachers",
]
FAST = ("--loader", "torch", "--workers", "1", "--device", "cpu")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def rob(monkeypatch, capsys) -> Callable[..., Outcome]:
    """``rob(*arguments)``: the console script, in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rob", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(rob, tmp_path) -> Callable[..., None]:
    """``refused(code, message, *arguments)``: one sentence that matches, that exit code, and no file made or changed."""

    def check(code: int, message: str, *arguments: object) -> None:
        before = snapshot(tmp_path)
        outcome = rob(*arguments)
        assert re.search(message, outcome.err), outcome.err
        assert outcome.code == code
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert "Traceback" not in outcome.out + outcome.err
        assert snapshot(tmp_path) == before

    return check


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Made:
    """What the commands made of 24 images in two classes. Not to be changed."""

    images: Path
    data: Path
    checkpoint: Path
    store: Path

    @property
    def cache(self) -> tuple:
        """Arguments of ``rob cache-teacher`` behind DATA and OUT."""
        return ("--teacher", TEACHER, "--checkpoint", self.checkpoint, "--view-size", 32, "--views", 2, *FAST)

    @property
    def train(self) -> tuple:
        """Arguments of ``rob train-student``, but --out and what is under test."""
        student = ("--student", "test_resnet", "--no-small-images", "--image-size", 32, "--hidden-dim", 16)
        return (self.data, "--targets", self.store, *student, "--epochs", 1, "--batch-size", 8, *FAST)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    made = Made(
        tiny_images(folder / "images", 24), folder / "data.beton",
        tiny_teacher_checkpoint(folder).checkpoint, folder / "targets.zarr",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            ("pack", made.images, made.data, "--workers", 1),
            ("cache-teacher", made.data, made.store, *made.cache),
        ):
            patch.setattr(sys, "argv", ["rob", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code
    return made


# ==== the main job ====


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
    outcome = rob("train-student", *made.train, "--targets", store, "--out", run, "--log-every", 1)
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
    outcome = rob("train-student", *made.train, "--targets", store, "--out", tmp_path / "run", *dino)
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pairing"]["pairing"] == "cross"
    warm = ("--objective", "dino", "--teacher-temp", 0.2, "--out", tmp_path / "warm")
    outcome = rob("train-student", *made.train, "--targets", store, *warm)
    assert outcome.code == 2
    assert outcome.err.startswith("error: teacher temperature 0.2 is outside of the store's ladder 0.025 to 0.1: ")
    assert not (tmp_path / "warm").exists()
    assert (tmp_path / "run" / "student_average.safetensors").exists()


def test_every_objective_is_a_word_of_the_command(rob, made, tmp_path):
    store = tmp_path / "fitted.zarr"
    assert rob("cache-teacher", made.data, store, *made.cache, "--prototypes", 6).code == 0
    options = {
        "dino": ("--centre-targets", "running", "--head", "teacher"),
        "ibot": ("--sinkhorn", "batch", "--no-head-norm"),
        "swav": ("--queue", 3, "--head", "frozen"),
        "msn": ("--mean-entropy", 0.5, "--student-temp", 0.2),
        "moco": ("--queue", 12, "--centre-targets", "calibration"),
        "disco": ("--only-consistency", "--consistency-weight", 2),
    }
    outcome = rob("train-student", *made.train, "--targets", store, "--out", tmp_path / "usual")
    assert "--objective dino, since the targets have prototypes" in " ".join(outcome.out.split() + outcome.err.split())
    assert json.loads((tmp_path / "usual" / "config.json").read_text())["objective"]["name"] == "dino"
    for name, given in options.items():
        run = tmp_path / name
        outcome = rob("train-student", *made.train, "--targets", store, "--out", run, "--objective", name, *given)
        assert outcome.code == 0, outcome.err
        assert json.loads((run / "config.json").read_text())["objective"]["name"] == name
        assert (run / "student.safetensors").exists()


def test_momentum_targets_need_no_teacher(rob, made, tmp_path):
    for name, given in {"dino": ("--prototypes", 8), "swav": ("--prototypes", 6), "moco": ("--num-local", 0)}.items():
        run = tmp_path / name
        outcome = rob(
            "train-student",
            *made.train,
            "--targets",
            "momentum",
            "--out",
            run,
            "--objective",
            name,
            "--num-local",
            1,
            *given,
        )
        assert outcome.code == 0, outcome.err
        config = json.loads((run / "config.json").read_text())
        assert config["branch"]["kind"] == "momentum"
        assert not config["pairing"]["fresh"]
        assert config["freeze_prototypes"] == (0 if name == "moco" else 1)


def test_the_online_teacher_is_the_same_command(rob, made, tmp_path):
    teacher = ("--teacher", TEACHER, "--checkpoint", made.checkpoint, "--view-size", 32, "--views", 2)
    outcome = rob("train-student", *made.train, "--targets", "online", *teacher, "--out", tmp_path / "run")
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


def test_without_ffcv_one_line_says_so(rob, made, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "ffcv_backend", None)
    outcome = rob("cache-teacher", made.data, tmp_path / "t.zarr", *made.cache, "--loader", "auto")
    assert outcome.out.count("the slower torch loader is used") == 1
    assert TargetStore.open(tmp_path / "t.zarr").manifest.geometry == "pillow"


# ==== help ====


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(rob, command):
    outcome = rob(*command.split(), "--help")
    assert outcome.code == 0
    assert outcome.out.lstrip().startswith(f"Usage: rob {command}".rstrip())


def test_help_imports_neither_torch_nor_numpy():
    """A child process, because this one has them already."""
    script = f"""
import contextlib, io, sys
from rob import cli
for command in {COMMANDS!r}:
    sys.argv = ["rob", *command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main()
    assert "Usage" in text.getvalue()
print(*sorted({{"torch", "numpy", "timm", "zarr", "numba", "ffcv", "PIL", "matplotlib"}} & sys.modules.keys()))
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.stdout, child.stderr) == ("\n", "")


# ==== exit codes of the real thing ====


def test_misuse_is_exit_code_2_and_one_sentence_on_stderr(tmp_path):
    command = [sys.executable, "-m", "rob", "pack", str(tmp_path / "nowhere"), str(tmp_path / "out.beton")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")
    assert child.stderr.count("\n") == 1


def test_ctrl_c_is_exit_code_130(rob, made, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        outcome = rob("train-student", *made.train, "--out", tmp_path / "run")
    assert outcome.code == 130
    assert "stopped at step 0 of 3: run the same command again to go on from there" in outcome.out
    assert rob("train-student", *made.train, "--out", tmp_path / "run").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        outcome = rob("cache-teacher", made.data, tmp_path / "t.zarr", *made.cache)
    assert outcome.code == 130
    assert "stopped: run the same command again to go on from the last whole chunk" in outcome.out


def test_what_the_system_refuses_is_one_sentence(refused, made, tmp_path):
    (tmp_path / "notes").write_text("a file")
    refused(1, r"notes", "train-student", *made.train, "--out", tmp_path / "notes" / "run")


# ==== images that are not there, or not images ====


def test_rows_keep_the_folders_order_where_asked(rob, made, tmp_path):
    assert rob("pack", made.images, tmp_path / "kept.beton", "--keep-order").code == 0
    kept, shuffled = Beton(tmp_path / "kept.beton").manifest.paths, Beton(made.data).manifest.paths
    assert list(kept) == sorted(shuffled) != list(shuffled)


def test_pack_without_images(refused, made, tmp_path):
    out = tmp_path / "out.beton"
    refused(2, "nowhere: no such folder; SOURCE is a folder", "pack", tmp_path / "nowhere", out)
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


# ==== names that nobody knows ====


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--teacher",
            "test_efficientnet_gm",
            r"unknown teacher 'test_efficientnet_gm': did you mean .*test_efficientnet_gn",
        ),
        ("--recipe", "dinno", r"unknown recipe 'dinno': did you mean dino\? \(known: dino, moco-v2, "),
        ("--encoding", "tpok", "unknown encoding 'tpok': .*topk"),
        ("--store-dtype", "float8", r"unknown store dtype 'float8': .*known: float16, float32, int8"),
        ("--precision", "bf8", "unknown precision 'bf8': did you mean bf16"),
        ("--device", "cud", "unknown device 'cud': did you mean cuda"),
        ("--loader", "fcv", r"unknown loader 'fcv': did you mean ffcv\? \(known: auto, ffcv, gpu, torch\)"),
        ("--global-scale", (0.5, 0.2), "scale is .*expected 0 < low <= high"),
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
        (("--objective", "embeding"), "unknown objective 'embeding': did you mean embedding"),
        (("--pairing", "sane"), "unknown pairing 'sane': did you mean same"),
        (("--optimiser", "adam"), "unknown optimiser 'adam': did you mean adamw"),
        (("--precision", "fp17"), "unknown precision 'fp17': did you mean fp16"),
        (("--precision", "fp16"), "fp16 needs a GPU: on a CPU use fp32"),
        (("--device", "gpu0"), "unknown device 'gpu0'"),
        (("--batch-size", 25), "--batch-size 25 is more than the 24 images"),
        (("--step-targets", 3), "holds 2 views .* --step-targets 2"),
        (("--warmup-epochs", 1), "leaves nothing of a run of 1"),
        (("--optimiser", "lars", "--weight-decay", 0), "lars adapts only"),
        (("--trust", 0.02), "--trust is for --optimiser lars, and it is adamw"),
        (("--optimiser", "lars", "--trust", 0), "--trust is 0, expected a value above 0"),
        (("--objective", "dino"), "the teacher has no head: fit prototypes"),
        (("--objective", "swav"), "--objective swav needs prototype logits, but the teacher has no head"),
        (("--objective", "moco", "--sinkhorn", "batch"), "--sinkhorn means nothing to --objective moco"),
        (("--objective", "disco", "--pairing", "cross"), "disco compares the same views: leave out --pairing"),
        (("--objective", "moco", "--queue", 25), "--queue 25 is longer than the data set of 24 images"),
        (("--centre-targets", "calibrate"), "unknown centre 'calibrate': did you mean calibration"),
        (("--student", "test_vit", "--small-images", "--image-size", 30), "cannot take images of 30 x 30 px"),
        (("--student", "test_convnext", "--small-images"), "no small-image form .* --no-small-images"),
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
        (("--targets", "momentum", "--pairing", "all"), "a view that meets itself has nothing to learn"),
        (("--freeze-prototypes", 1), "--objective embedding has none"),
        (("--pairing", "same", "--num-local", 2), "same has no target for a local crop"),
        (("--pairing", "same", "--fresh"), "--fresh is for --pairing cross"),
        (("--pairing", "cross", "--replay", "--step-targets", 1, "--num-local", 0), "leaves no pair"),
        (("--global-weight", 0.4), "--global-weight is against local crops"),
        (("--targets", "online", "--teacher", "nobody"), "unknown teacher 'nobody'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_train_student_refuses(refused, made, tmp_path, options, message):
    refused(2, message, "train-student", *made.train, "--out", tmp_path / "run", *options)


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


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
)
def test_out_of_memory_is_one_sentence(rob, made, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    train = ("train-student", *made.train, "--out", tmp_path / "run")
    outcome = rob(*train)
    assert (outcome.code, outcome.err) == (
        1,
        "error: out of memory: lower --batch-size, the size of the views, or --prototypes\n",
    )
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        rob(*train)


def test_a_store_of_another_precision_is_verified_by_option(rob, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "half.zarr")
    text = (store / "zarr.json").read_text()
    assert text.count('"fp32"') == 1
    (store / "zarr.json").write_text(text.replace('"fp32"', '"fp16"'))
    verify = ("verify", store, made.data, "--teacher", TEACHER, "--checkpoint", made.checkpoint, "--device", "cpu")
    outcome = rob(*verify)
    assert (outcome.code, "fp16 needs a GPU: on a CPU use fp32" in outcome.err) == (2, True)
    outcome = rob(*verify, "--precision", "fp32")
    assert outcome.code == 0, outcome.err


def test_folders_and_stores_are_no_images_and_no_runs(refused, made, tmp_path):
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
    refused(2, "--out .*store.zarr is a target store: give the run a folder", "train-student", *train, "--out", store)


def test_a_store_that_lost_targets_is_not_complete(refused, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "store.zarr")
    lost = next(file for file in (store / "embedding" / "c").rglob("*") if file.is_file())
    lost.unlink()
    message = f"store.zarr is damaged, {lost} is missing: delete the store and run rob cache-teacher again"
    refused(1, message, "cache-teacher", made.data, store, *made.cache)
    refused(1, message, "inspect", store)


def test_a_damaged_line_of_the_log_is_named(rob, refused, made, tmp_path):
    train = ("train-student", *made.train, "--out", tmp_path / "run")
    assert rob(*train).code == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo\n')
    refused(1, r"metrics\.jsonl: line \d is damaged: delete that line", *train)
    refused(1, r"metrics\.jsonl: line \d is damaged", "compare", tmp_path / "run", "--out", tmp_path / "a.png")


def test_the_small_image_form_is_said_unless_asked_for(rob, made, tmp_path):
    words = ("train-student", made.data, "--targets", made.store, "--image-size", 32, "--batch-size", 8, *FAST)
    small = ("--student", "test_resnet", "--epochs", 1, "--hidden-dim", 16)
    said = "the small-image form of test_resnet, for --image-size up to 64"
    assert said in rob(*words, *small, "--out", tmp_path / "default").out
    assert said not in rob(*words, *small, "--out", tmp_path / "asked", "--small-images").out


def test_evaluation_refuses(refused, made, tmp_path):
    knn = ("eval", "knn")
    rest = (made.data, "--test", made.data, *FAST)
    refused(2, "nowhere: no such file", *knn, tmp_path / "nowhere", *rest)
    (tmp_path / "run").mkdir()
    refused(2, r"no student\.safetensors in .*: give a finished run's folder", *knn, tmp_path / "run", *rest)
    refused(2, "needs --teacher NAME", *knn, "teacher", *rest)
    refused(2, "k = 25 neighbours of 24 training images", *knn, "pixels", *rest, "--k", 25)


def test_images_without_labels_cannot_be_evaluated(rob, refused, made, tmp_path):
    assert rob("pack", made.images / "class0", tmp_path / "flat.beton").code == 0
    refused(
        2, r"flat\.beton has no labels", "eval", "knn", "pixels", tmp_path / "flat.beton", "--test", made.data, *FAST
    )


def test_inspect_and_bench_refuse(refused, made, tmp_path):
    refused(2, "there is nothing at .*nowhere", "inspect", tmp_path / "nowhere")
    refused(2, "not a target store", "inspect", tmp_path)
    refused(2, "unknown benchmark 'pipelines': did you mean pipeline", "bench", "pipelines")
    refused(2, "--sheet of a store needs its images: pass --data", "inspect", made.store, "--sheet", tmp_path / "a.png")


@pytest.mark.parametrize("arguments", [("pak",), ("pack", "--jpeg-quality", "101", "a", "b"), ("train-student",)])
def test_what_the_parser_refuses_is_exit_code_2(rob, arguments):
    outcome = rob(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


# ==== teachers and stores that do not fit ====


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
        2, "was cached from another data set: data_fingerprint is", "train-student", tmp_path / "other.beton", *train
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
    train = ("train-student", *made.train, "--out", tmp_path / "run", "--targets")
    refused(2, "there is no target store at .*nowhere: make one with rob cache-teacher", *train, tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    refused(2, "folder is not a target store: it is no Zarr v3 group", *train, tmp_path / "folder")
    store = shutil.copytree(made.store, tmp_path / "old.zarr")
    group = json.loads((store / "zarr.json").read_text())
    group["attributes"]["format_version"] = 0
    (store / "zarr.json").write_text(json.dumps(group))
    refused(2, "has format version 0, this rob reads version 1: cache the targets again", *train, store)


def test_a_damaged_chunk(refused, rob, made, tmp_path):
    store = shutil.copytree(made.store, tmp_path / "targets.zarr")
    chunk = next(path for path in (store / "embedding" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    verify = ("verify", store, made.data, "--teacher", TEACHER, "--checkpoint", made.checkpoint, "--device", "cpu")
    refused(1, "chunk 0 of array 'embedding' .* is damaged", *verify)
    outcome = rob("train-student", *made.train, "--targets", store, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert re.match("error: .*chunk 0 of array 'embedding' .* is damaged", outcome.err)
    assert outcome.err.count("\n") == 1


# ==== runs that break ====


def test_a_full_disk_while_caching_keeps_what_is_written(rob, made, tmp_path, monkeypatch):
    store, whole = tmp_path / "targets.zarr", made.store
    writes, fsync = [], os.fsync

    def full_after_one(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_one)
        outcome = rob("cache-teacher", made.data, store, *made.cache)
    assert outcome.code == 1
    assert re.match("error: the disk of .* is full: .* what is written is safe: make room and run", outcome.err)
    assert outcome.err.count("\n") == 1
    train = rob("train-student", *made.train, "--targets", store, "--out", tmp_path / "run")
    assert train.code == 2
    assert "is half-written, 0 of 24 rows are done: run rob cache-teacher again to go on" in train.err
    assert not (tmp_path / "run").exists()

    assert rob("cache-teacher", made.data, store, *made.cache).code == 0
    assert contents(store) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_too_large_for_the_disk_is_refused_beforehand(refused, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(2, "needs 0.00 GB and 0.00 GB are free", "cache-teacher", made.data, tmp_path / "t.zarr", *made.cache)


def test_nan_is_exit_code_1_and_keeps_the_checkpoint(rob, made, tmp_path):
    run = ("train-student", *made.train, "--out", tmp_path / "run", "--optimiser", "sgd", "--clip-grad", 0)
    outcome = rob(*run, "--lr", 1e38, "--warmup-epochs", 0)
    assert outcome.code == 1
    assert re.match(r"error: step \d+: the loss is .*; there is no checkpoint yet\. Lower --lr", outcome.err)
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_other_settings_on_resume_are_refused_by_name(rob, refused, made, tmp_path):
    command = ("train-student", *made.train, "--out", tmp_path / "run")
    assert rob(*command).code == 0
    refused(
        2, "made with optimiser.lr = 0.0005, this run has optimiser.lr = 0.001: resume with", *command, "--lr", 0.001
    )
    refused(2, "made with epochs = 1, this run has epochs = 2", *command, "--epochs", 2)  # not the warm-up that follows
