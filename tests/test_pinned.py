"""What commit c1ea833 computes: views, targets and the first losses, kept while files move and names change.

The expectations are those of commit c1ea833, in pinned.npz and pinned.json, but for what a change of defaults moved: its commit
lists those rows, and leaves the others as they are to the last byte. Else they are not to be edited; neither is this file.
``support/pinned.py`` is how the code is reached, and may follow a renaming. ``python tests/test_pinned.py --write`` wrote the
expectations, and is kept to show how. The store ``written`` is that commit's own.

The inputs are arithmetic (integer waves, PCG64's raw doubles) or bytes in the fixture, so that no release of Pillow or
torch changes them. Students start from torch's generator: another release of torch may start them elsewhere.
"""

import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as conftest.py has it, where this file is run by itself

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pinned import (
    FIRST_LOCAL_ID,
    HAS_COMPILED_LOADER,
    augmented,
    drawn,
    network_inputs,
    rob,
    stored_targets,
)

HERE = Path(__file__).parent
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
needs_compiled = pytest.mark.skipif(not HAS_COMPILED_LOADER, reason="ffcv is not installed, and its views are expected")
LOADERS = [pytest.param("ffcv", marks=needs_compiled), "torch"]
RECIPES = {
    "dino": True,
    "sslight": True,
    "swav": True,
    "sslight-swav": True,
    "msn": True,
    "moco-v2": False,
    "weak": False,
}
"""All there are, and whether they have local crops."""

# ==== inputs ====


def picture(number: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: waves of a frequency that changes, one an axis and channel, and a box; all in integers."""
    y, x = np.mgrid[:height, :width].astype(np.int64) * 64 // max(height, width)
    channels = []
    for c in range(3):
        a, b, d = (number * 7 + c * 5) % 11 + 2, (number * 5 + c * 3) % 7 + 1, (number + c) % 3 + 1
        wave = (a * x * 3 + b * y * 4 + d * x * y // 16 + number * 61 + c * 97) % 510
        channels.append(np.abs(wave - 255))
    pixels = np.stack(channels, 2)
    box = (x // 8 + number) % 5 + (y // 8) % 3 == 2
    pixels[box] = (pixels[box] * (2, 1, 3) // 3 + (60, 90, 0)) % 256
    return pixels.astype(np.uint8)


JPEGS = {"a": (40, 56, 90, 2), "b": (230, 180, 75, 2), "c": (31, 64, 92, 0), "d": (64, 47, 85, 1)}
"""Height, width, quality, subsampling. Some crops of b are decoded at half the size."""
RAW_SIZES = [(36, 50), (20, 23)]
TRAINING_IMAGES = 16
PACKED = ("jpeg", "raw", "training")


def jpeg(number: int, name: str) -> bytes:
    height, width, quality, subsampling = JPEGS[name]
    buffer, options = io.BytesIO(), {"progressive": name == "d"}
    Image.fromarray(picture(number, height, width)).save(
        buffer, "JPEG", quality=quality, subsampling=subsampling, **options
    )
    return buffer.getvalue()


TEACHER = "test_efficientnet_gn"


def weights(names_and_shapes: Mapping[str, tuple[int, ...]], seed: int, std: float | None = None) -> dict[str, Any]:
    """Uniform, of deviation ``std`` (None: He's); what has one axis is 1 if it scales and else near 0."""
    random, tensors = np.random.Generator(np.random.PCG64(seed)), {}
    for name, shape in sorted(names_and_shapes.items()):
        uniform = (random.random(shape) - 0.5) * 12**0.5
        he = (2 / np.prod(shape[1:])) ** 0.5
        values = uniform * (std or he) if len(shape) > 1 else uniform * 0.1 + name.endswith("weight")
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


def teacher_files(folder: Path) -> dict[str, Path]:
    """A bare backbone as timm names it; and one in DINO's layout with a head, 24 prototypes and a centre."""
    shapes = {name: tuple(t.shape) for name, t in timm.create_model(TEACHER, num_classes=0).state_dict().items()}
    features, hidden, dim, num = 256, 32, 20, 24
    bare = weights(shapes, 1)
    mlp = weights(
        {f"mlp.{n}.weight": s for n, s in ((0, (hidden, features)), (2, (hidden,) * 2), (4, (dim, hidden)))}, 2
    )
    mlp |= weights({f"mlp.{n}.bias": (width,) for n, width in ((0, hidden), (2, hidden), (4, dim))}, 3)
    last = weights({"last_layer.weight_v": (num, dim)}, 4) | weights({"last_layer.weight_g.weight": (num,)}, 5)
    last["last_layer.weight_g"] = last.pop("last_layer.weight_g.weight")[:, None].contiguous()
    headed = {f"teacher.backbone.{name}": tensor for name, tensor in bare.items()}
    headed |= {f"teacher.head.{name}": tensor for name, tensor in (mlp | last).items()}
    headed["dino_loss.center"] = weights({"centre": (1, num)}, 6, std=0.1)["centre"]
    for name, tensors in (("bare", bare), ("headed", headed)):
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("bare", "headed")}


STORES = {
    "float32": "headed --views 2 --encoding embedding --store-dtype float32",
    "float16": "headed --views 3 --recipe sslight --seed 5 --batch-size 4",
    "int8": "headed --views 2 --encoding embedding --store-dtype int8",
    "topk": "headed --views 2 --encoding topk --topk 5",
    "dense": "headed --views 2 --encoding dense",
    "bare": "bare --views 2 --recipe moco-v2 --colour 0.5 --global-scale 0.3 0.9 --flip 0.25",
    "fitted": "bare --views 4 --prototypes 6 --recipe weak --centre 0.7",
    "fitted-topk": "bare --views 4 --prototypes 6 --recipe swav --encoding topk --topk 3 --grey 0.5 --blur 0.9",
    "fitted-dense": "bare --views 4 --prototypes 6 --recipe swav --encoding dense --solarise 0.5 --loader torch",
}
"""Which teacher, and options of rob cache-teacher."""


class World:
    """Packed data, teachers and stores, made when they are first asked for. ``jpegs``: the files' bytes by name."""

    def __init__(self, folder: Path, jpegs: Mapping[str, bytes]) -> None:
        self.folder, self.jpegs = folder, jpegs
        self.teachers = teacher_files(folder)

    def data(self, name: str) -> Path:
        """``jpeg``: the fixture's files. ``raw`` and ``training``: pixels, by way of PNG, which loses nothing."""
        packed = self.folder / f"{name}.beton"
        if packed.exists():
            return packed
        source = self.folder / name
        if name == "jpeg":
            source.mkdir()
            for key, content in self.jpegs.items():
                (source / f"{key}.jpg").write_bytes(content)
        else:
            sizes = RAW_SIZES if name == "raw" else [(40 + n % 5, 46 - n % 7) for n in range(TRAINING_IMAGES)]
            for number, (height, width) in enumerate(sizes):
                path = source / f"class{number % 3}" / f"{number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(number, height, width)).save(path)
        how = () if name == "training" else ("--keep-order",)
        rob("pack", source, packed, "--workers", 1, *how, *(() if name == "jpeg" else ("--raw",)))
        return packed

    def pack_manifest(self, name: str) -> dict[str, Any]:
        return json.loads(self.data(name).with_name(f"{name}.beton.json").read_text())

    def store(self, name: str) -> Path:
        path = self.folder / f"{name}.zarr"
        if not path.exists():
            teacher, *options = STORES[name].split()
            usual = ("--recipe", "dino", "--view-size", 32, "--loader", "ffcv", "--workers", 1, "--device", "cpu")
            checkpoint = ("--teacher", TEACHER, "--checkpoint", self.teachers[teacher])
            rob("cache-teacher", self.data("training"), path, *checkpoint, *usual, *options)
        return path

    def train(self, name: str) -> dict[str, Any]:
        """The three log lines from TRAININGS' first step on, and how far the exported average is from the student."""
        first, options = TRAININGS[name]
        words = ["--student", "test_resnet", "--image-size", 16, "--hidden-dim", 16, "--batch-size", 8, "--epochs", 2]
        words += ["--loader", "ffcv", "--workers", 1, "--device", "cpu", "--log-every", 1, "--checkpoint-every", 99]
        for word in options.split():
            kind, _, value = word.partition(":")
            words.append(self.store(value) if kind == "store" else self.teachers[value] if kind == "file" else word)
        out = self.folder / "runs" / name
        rob("train-student", self.data("training"), "--out", out, *words)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found: dict[str, Any] = {
            "steps": [{field: line[field] for field in FIELDS if field in line} for line in lines[first : first + 3]],
        }
        if (out / "student_average.safetensors").exists():
            student, average = (load_file(out / f"student{suffix}.safetensors") for suffix in ("", "_average"))
            moved = [
                (student[k] - average[k]).double().square().sum() for k in student if student[k].is_floating_point()
            ]
            found["distance_of_average"] = float(torch.stack(moved).sum().sqrt())
        shutil.rmtree(out)
        return found


FIELDS = ("step", "epoch", "loss", "gradient_norm", "lr", "target_entropy", "mean_target_entropy", "target_std")
"""Of a line of metrics.jsonl."""

# ==== trainings ====

ONLINE = f"--targets online --teacher {TEACHER} --checkpoint file:headed --view-size 32 --recipe dino"
RATE = "--lr 0.02"
FEW = "--num-local 2"


def cached(store: str, options: str) -> tuple[int, str]:
    return 0, f"--targets store:{store} {RATE} {options}"


def online(options: str) -> tuple[int, str]:
    return 0, f"{ONLINE} {RATE} {options}"


def copied(options: str, first: int = 0) -> tuple[int, str]:
    return first, f"--targets momentum {RATE} --prototypes 16 {options}"


def preset(name: str, options: str = f"{FEW} --prototypes 16") -> tuple[int, str]:
    return 0, f"--preset {name} --epochs 2 {options}"


TRAININGS: dict[str, tuple[int, str]] = {
    # ==== a store of embeddings ====
    "embedding": cached("float32", "--objective embedding"),
    "embedding-bare": cached("bare", ""),
    "embedding-calibration": cached("bare", "--objective embedding --centre-targets calibration --no-head-norm"),
    "embedding-int8": cached("int8", "--objective embedding --step-targets 1"),
    "embedding-cross": cached("float16", f"--objective embedding --pairing cross {FEW}"),
    "embedding-all": cached("float16", f"--objective embedding --pairing all {FEW} --local-size 12"),
    "disco": cached("float32", "--objective disco"),
    "disco-only-consistency": cached("bare", "--objective disco --only-consistency"),
    "disco-weighed": cached("float32", "--objective disco --consistency-weight 32 --queue 4 --student-temp 0.1"),
    "moco": cached("float32", f"--objective moco {FEW}"),
    "moco-replay": cached("float32", "--objective moco --replay --num-local 0 --queue 8 --student-temp 0.1"),
    "moco-same": cached("bare", "--objective moco --pairing same --centre-targets calibration"),
    "dino": cached("float32", FEW),
    "dino-replay": cached("float32", f"{FEW} --replay"),
    "dino-no-locals": cached("float16", "--num-local 0 --step-targets 1"),
    "dino-all": cached("float32", f"--pairing all {FEW} --global-weight 0.4"),
    "dino-same": cached("float32", "--pairing same"),
    "dino-sslight": cached("float16", f"{FEW} --seed 3"),
    "dino-fresh-head": cached("float32", f"{FEW} --head fresh"),
    "dino-frozen-head": cached("float32", f"{FEW} --head frozen"),
    "dino-calibration": cached("float32", f"{FEW} --centre-targets calibration"),
    "dino-running": cached("float32", f"{FEW} --centre-targets running"),
    "dino-checkpoint": cached("float32", f"{FEW} --centre-targets checkpoint"),
    "dino-sinkhorn": cached("float32", f"{FEW} --sinkhorn batch"),
    "dino-queue": cached("float32", f"{FEW} --sinkhorn queue --queue 12"),
    "dino-learned-lengths": cached("float32", f"{FEW} --no-norm-last-layer --no-head-norm"),
    "dino-temperatures": cached("float32", f"{FEW} --student-temp 0.2 --teacher-temp 0.04 --mean-entropy 0.5"),
    "dino-still": cached("float32", f"{FEW} --freeze-prototypes 1"),
    "ibot": cached("float32", f"--objective ibot {FEW}"),
    "swav": cached("float32", f"--objective swav {FEW}"),
    "swav-batch": cached("float32", f"--objective swav {FEW} --sinkhorn batch --head teacher"),
    "swav-none": cached("float32", f"--objective swav {FEW} --sinkhorn none"),
    "msn": cached("float32", f"--objective msn {FEW}"),
    "msn-replay": cached("float32", f"--objective msn {FEW} --replay --mean-entropy 0 --head frozen"),
    "msn-none": cached("float32", f"--objective msn {FEW} --sinkhorn none --centre-targets calibration"),
    "fitted-dino": cached("fitted", "--num-local 0"),
    "fitted-swav": cached("fitted", "--num-local 0 --objective swav"),
    # ==== stores of logits ====
    "topk-dino": cached("topk", FEW),
    "topk-ladder": cached("topk", f"{FEW} --teacher-temp 0.085 --head frozen"),
    "topk-ibot": cached("topk", f"{FEW} --objective ibot --centre-targets calibration --head teacher"),
    "topk-swav": cached("topk", f"{FEW} --objective swav --sinkhorn none"),
    "topk-msn": cached("topk", f"{FEW} --objective msn --sinkhorn none --teacher-temp 0.025"),
    "topk-fitted": cached("fitted-topk", f"{FEW} --objective dino --teacher-temp 0.05"),
    "dense-dino": cached("dense", f"{FEW} --centre-targets running"),
    "dense-swav": cached("dense", f"{FEW} --objective swav --queue 16"),
    "dense-msn": cached("dense", f"{FEW} --objective msn"),
    "dense-fitted": cached("fitted-dense", f"{FEW} --objective ibot --global-weight 0.3 --teacher-temp 0.05"),
    # ==== the live teacher ====
    "online-embedding": online("--objective embedding"),
    "online-disco": online("--objective disco --recipe moco-v2 --views 2"),
    "online-moco": online(f"--objective moco {FEW}"),
    "online-dino": online(f"--objective dino {FEW} --views 2"),
    "online-ibot": online(f"--objective ibot {FEW} --centre-targets checkpoint --recipe sslight"),
    "online-swav": online(f"--objective swav {FEW} --recipe swav"),
    "online-msn": online(f"--objective msn {FEW} --recipe msn"),
    "online-views": online(
        f"--objective dino {FEW} --global-scale 0.5 0.9 --local-scale 0.1 0.2 --colour 0.5 --flip 0.1 --grey 0.6 --blur 0.3 "
        "--solarise 0.4"
    ),
    # ==== no teacher ====
    "momentum-dino": copied(f"--objective dino {FEW} --warmup-teacher-temp-epochs 2"),
    "momentum-dino-warming": copied(f"--objective dino {FEW} --copy-momentum 0.9 --freeze-prototypes 0"),
    "momentum-dino-sinkhorn": copied(f"--objective dino {FEW} --sinkhorn batch --teacher-temp 0.03"),
    "momentum-dino-centre": copied("--objective dino --num-local 0 --centre 0.8 --centre-targets none"),
    "momentum-ibot": copied(f"--objective ibot {FEW} --recipe sslight"),
    "momentum-swav": copied(f"--objective swav {FEW} --recipe swav"),
    "momentum-swav-batch": copied(f"--objective swav {FEW} --recipe sslight-swav --sinkhorn batch --teacher-temp 0.02"),
    "momentum-swav-queue": copied("--objective swav --num-local 0 --epochs 17 --lr 0.0005", first=30),
    "momentum-msn": copied(f"--objective msn {FEW} --recipe msn --copy-momentum 0.5"),
    "momentum-moco": (0, f"--targets momentum --objective moco --recipe moco-v2 {RATE} --copy-momentum 0.9"),
    "momentum-moco-locals": (0, f"--targets momentum --objective moco {RATE} {FEW} --queue 16"),
    # ==== students, optimisers ====
    "vit": cached("float32", f"{FEW} --student test_vit --drop-path 0.3"),
    "vit-momentum": copied(f"--objective dino {FEW} --student test_vit --drop-path 0.3"),
    "vit-large-patches": cached(
        "float32", "--objective embedding --student test_vit --no-small-images --image-size 32"
    ),
    "mobile": cached("float32", f"{FEW} --student test_efficientnet"),
    "mobile-residuals": cached("float32", "--objective embedding --student mobilenetv2_035"),
    "large-stem": cached("float32", "--objective embedding --no-small-images --image-size 32"),
    "lars": cached("float32", f"{FEW} --optimiser lars --lr 2 --weight-decay 1e-2 --trust 0.02"),
    "lars-usual": cached("float32", f"{FEW} --optimiser lars --lr 4 --weight-decay 1e-6 --min-lr 0.01 --clip-grad 0"),
    "sgd": cached("float32", f"{FEW} --optimiser sgd --lr 1 --weight-decay 0.1 --clip-grad 0.5"),
    "decay": cached("float32", f"{FEW} --weight-decay 5 --weight-decay-end 50"),
    "warm-up": cached("float32", f"{FEW} --epochs 10"),
    "usual-rate": (0, f"--targets store:float32 {FEW} --warmup-epochs 1 --epochs 3"),
    "average": cached("float32", f"{FEW} --average 0.5"),
    "average-slow": cached("float32", f"{FEW} --average 0.999"),
    "in-memory": cached("topk", f"{FEW} --cache-in-memory"),
    "pillow": cached("float32", f"{FEW} --loader torch"),
    # ==== presets ====
    "preset-dino-cnn": preset("dino-cnn"),
    "preset-dino-vit": preset("dino-vit", f"{FEW} --prototypes 16 --student test_vit"),
    "preset-sslight-cnn": preset("sslight-cnn"),
    "preset-sslight-vit": preset("sslight-vit", f"{FEW} --prototypes 16 --student test_vit"),
    "preset-swav-cnn": preset("swav-cnn"),
    "preset-sslight-swav-cnn": preset("sslight-swav-cnn"),
    "preset-moco-cnn": preset("moco-cnn", FEW),
    "preset-sslight-moco-cnn": preset("sslight-moco-cnn", FEW),
    "preset-moco-v2": preset("moco-v2", ""),
    "preset-msn-vit": preset("msn-vit", f"{FEW} --prototypes 16 --student test_vit"),
    "preset-disco": preset("disco", "--targets store:bare"),
    "preset-of-a-store": preset("sslight-cnn", f"{FEW} --targets store:float32"),
}
"""The first step that is compared (from 0), and options of rob train-student."""

# ==== views ====

SEEDS = (0, 2**40 + 3)
DRAWN_IMAGES = {0: (48, 64), 1: (375, 500), 2: (64, 48), 7: (33, 90), 1281166: (2000, 1500), 2**33 + 5: (10, 400)}
"""Image id: its height and width. The last fits few crops."""
DRAWN_VIEWS = (0, 1, 2, 3, 13, 404, 2**20 - 1)
DRAWN_LOCAL_VIEWS = tuple(FIRST_LOCAL_ID + n for n in (0, 1, 77))
TRIED_WIDTH = 300
"""Beside a height of 100."""
SHOWN = ((0, 5), 12), ((FIRST_LOCAL_ID + 3,), 8)
"""View ids and sizes in pixels of the global and the local crops."""


def draw(recipe: str) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, images, views, 5) and (seeds, images, views, 8)."""
    views = np.array(DRAWN_VIEWS + (DRAWN_LOCAL_VIEWS if RECIPES[recipe] else ()))
    images = np.array(list(DRAWN_IMAGES))[:, None]
    heights, widths = np.array(list(DRAWN_IMAGES.values())).T[..., None]
    parts = [drawn(recipe, seed, images, views, heights, widths) for seed in SEEDS]
    return np.stack([geometry for geometry, _ in parts]), np.stack([colour for _, colour in parts])


def draw_tries() -> np.ndarray:
    """(400, 5): of an image so long that a try fits once in eight, so that the last tries and what follows them show."""
    images = np.arange(400)
    return drawn("dino", 0, images, np.array(0), np.array(100), np.array(TRIED_WIDTH))[0]


def show(world: World, recipe: str, loader: str) -> np.ndarray:
    """(views' pixels,) float32 in grey levels, of the four JPEGs and the two raw images one behind another."""
    sets, pixels = list(SHOWN if RECIPES[recipe] else SHOWN[:1]), []
    mean, std = (np.float32(values)[:, None, None] for values in IMAGENET)
    for data in ("jpeg", "raw"):
        inputs = network_inputs(world.data(data), recipe, 7, loader, sets, IMAGENET)
        pixels += [((values * std + mean) * 255).ravel() for values in inputs]
    return np.concatenate(pixels)


def augment_case() -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 8, 8) and colour parameters (N, 8): each operation alone, then every order of all."""
    neutral = [1, 1, 1, 0, 0, 0, 0, 0]
    alone = [
        (0, 1.4),
        (0, 0.3),
        (1, 1.6),
        (1, 0.4),
        (2, 1.7),
        (2, 0.3),
        (3, 0.12),
        (3, -0.3),
        (5, 1),
        (6, 0.7),
        (6, 3),
        (7, 1),
    ]
    rows = [[*neutral[:n], value, *neutral[n + 1 :]] for n, value in alone]
    rows += [[1.3, 0.6, 1.5, 0.12, order, order % 4 == 3, 0.9 * (order % 3), order % 5 == 4] for order in range(24)]
    images = np.stack([picture(n, 8, 8).transpose(2, 0, 1) for n in range(len(rows))])
    return images, np.array(rows, np.float32)


LEVELS = 64
"""Steps of a grey level in which pixels are kept."""
ROWS = [0, 5, 15]
"""Of a store, that are kept."""

# ==== stores ====


def read_store(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest less the versions that wrote it; the targets of some rows, prototypes and statistics."""
    manifest = json.loads((path / "zarr.json").read_text())["attributes"]
    del manifest["versions"]
    targets, prototypes, statistics = stored_targets(path)
    arrays = {name: values[ROWS] for name, values in targets.items()}
    if prototypes is not None:
        arrays["prototypes"] = prototypes
    arrays |= {f"statistics.{name}": values for name, values in statistics.items()}
    wide = {name for name, values in arrays.items() if values.shape[-1:] == (256,)}
    return manifest, {name: values[..., ::16] if name in wide else values for name, values in arrays.items()}


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = zipfile.ZipInfo(str(path.relative_to(folder.parent)))  # of no time
            archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# ==== the expectations ====


class Expected:
    """Both files, as ``write`` left them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = json.loads((HERE / "pinned.json").read_text())
        with np.load(HERE / "pinned.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.jpegs = {name: self.arrays[f"jpeg/{name}"].tobytes() for name in JPEGS}

    @property
    def where(self) -> str:
        """For a message: whether another torch may be the reason."""
        here = torch.__version__.partition("+")[0]
        return f"torch is {here}, the expectations are of {self.values['torch']}"


def write() -> None:
    jpegs = {name: jpeg(number, name) for number, name in enumerate(JPEGS)}
    arrays: dict[str, np.ndarray] = {f"jpeg/{name}": np.frombuffer(data, np.uint8) for name, data in jpegs.items()}
    values: dict[str, Any] = {"commit": "c1ea833", "torch": torch.__version__.partition("+")[0]}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), jpegs)
        for name in PACKED:
            values[f"pack/{name}"] = world.pack_manifest(name)
        for recipe in RECIPES:
            arrays[f"geometry/{recipe}"], arrays[f"colour/{recipe}"] = draw(recipe)
            for loader in ("ffcv", "torch"):
                arrays[f"views/{recipe}/{loader}"] = np.rint(show(world, recipe, loader) * LEVELS).astype(np.int16)
        arrays["geometry/tries"] = draw_tries().astype(np.int16)
        arrays["augmented"] = augmented(*augment_case(), 0.8, IMAGENET)
        for name in STORES:
            values[f"store/{name}"], targets = read_store(world.store(name))
            arrays |= {f"store/{name}/{key}": target for key, target in targets.items()}
        arrays["written"] = np.frombuffer(zipped(world.store("topk")), np.uint8)
        values["store/written"], targets = read_store(world.store("topk"))
        arrays |= {f"store/written/{key}": target for key, target in targets.items()}
        for name in TRAININGS:
            values[f"training/{name}"] = world.train(name)
    np.savez_compressed(HERE / "pinned.npz", **arrays)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    (HERE / "pinned.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ==== the tests ====


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


@pytest.fixture(scope="module")
def world(expected, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("pinned"), expected.jpegs)


def assert_alike(found: Any, wanted: Any, what: str, rtol: float = 1e-3, atol: float = 0.0) -> None:
    """Plain values: floats nearly, all else exactly."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict), what
        assert found.keys() == wanted.keys(), what
        for key in wanted:
            assert_alike(found[key], wanted[key], f"{what}, {key}", rtol, atol)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rtol, abs=atol), what
    else:
        assert found == wanted, what


@pytest.mark.parametrize("name", PACKED)
def test_packed_bytes_and_their_order(expected, world, name):
    """The fingerprint is over every stored byte."""
    assert_alike(world.pack_manifest(name), expected.values[f"pack/{name}"], name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_crops_and_colours_that_are_drawn(expected, recipe):
    geometry, colour = draw(recipe)
    np.testing.assert_array_equal(geometry, expected.arrays[f"geometry/{recipe}"])
    np.testing.assert_allclose(colour, expected.arrays[f"colour/{recipe}"], rtol=1e-6, atol=1e-7)


def test_crops_that_fit_late_or_never(expected):
    np.testing.assert_array_equal(draw_tries(), expected.arrays["geometry/tries"])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_pixels_of_views(expected, world, recipe, loader):
    """Rounding may move a grey level here and there, the colours then up to two; another formula moves many."""
    found, wanted = show(world, recipe, loader), expected.arrays[f"views/{recipe}/{loader}"] / LEVELS
    difference = np.abs(found - wanted)
    assert difference.max() < 2.5
    assert difference.mean() < 0.1


def test_colours_of_given_parameters(expected):
    found = augmented(*augment_case(), 0.8, IMAGENET)
    np.testing.assert_allclose(found, expected.arrays["augmented"], rtol=0, atol=2e-5)


@needs_compiled
@pytest.mark.parametrize("name", STORES)
def test_stores(expected, world, name):
    manifest, arrays = read_store(world.store(name))
    assert_alike(manifest, expected.values[f"store/{name}"], name)
    check_targets(arrays, expected, name)


def test_a_store_of_that_commit_can_be_read(expected, tmp_path):
    with zipfile.ZipFile(io.BytesIO(expected.arrays["written"].tobytes())) as archive:
        archive.extractall(tmp_path)
    manifest, arrays = read_store(tmp_path / "topk.zarr")
    assert_alike(manifest, expected.values["store/written"], "written", rtol=0)
    check_targets(arrays, expected, "written")


def check_targets(arrays: dict[str, np.ndarray], expected: Expected, name: str) -> None:
    wanted = {key.removeprefix(f"store/{name}/"): a for key, a in expected.arrays.items() if f"store/{name}/" in key}
    assert arrays.keys() == wanted.keys()
    for key, values in wanted.items():
        assert arrays[key].dtype == values.dtype, key
        if key == "ids":
            # Logits that are nearly alike may change places, and the last one with one that is not kept.
            gaps = np.abs(np.diff(wanted["logits"], axis=-1)) > 2e-3
            clear = gaps[..., 1:] & gaps[..., :-1]
            assert clear.mean() > 0.5
            np.testing.assert_array_equal(arrays[key][..., 1:-1][clear], values[..., 1:-1][clear], key)
            np.testing.assert_array_equal(arrays[key][..., 0][gaps[..., 0]], values[..., 0][gaps[..., 0]], key)
        elif key == "statistics.usage":
            assert np.abs(arrays[key] - values).sum() <= 4  # two views whose two nearest prototypes are as near
        else:
            step = np.abs(values).max() / 127 if name == "int8" and key == "embedding" else 0.0
            np.testing.assert_allclose(arrays[key], values, rtol=1e-3, atol=1e-3 + step, err_msg=key)


@needs_compiled
@pytest.mark.parametrize("name", TRAININGS)
def test_first_losses(expected, world, name):
    found, wanted = world.train(name), expected.values[f"training/{name}"]
    for step, line in zip(found["steps"], wanted["steps"], strict=True):
        assert step.keys() == line.keys()
        for field, value in line.items():
            about = f"{field} of step {line['step']}, {expected.where}"
            rtol, atol = TOLERANCES.get(field, (0.0, 2e-4))
            assert step[field] == pytest.approx(value, rel=rtol, abs=atol), about
    assert found.keys() == wanted.keys()
    assert found.get("distance_of_average", 0) == pytest.approx(wanted.get("distance_of_average", 0), rel=1e-3)


TOLERANCES = {
    "step": (0.0, 0.0),
    "epoch": (0.0, 0.0),
    "loss": (5e-4, 1e-6),
    "gradient_norm": (1.5e-3, 1e-6),
    "lr": (1e-6, 0.0),
}
"""Relative and absolute. A processor without vector instructions differs by up to 1e-4 and 3e-4; what is said of the
targets is rounded to four decimals."""


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_pinned.py --write writes the expectations; pytest compares them")
    write()
