"""RoB's presets: every value of its authors' configurations, and the two commands of one word."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rob
from rob.cli import app
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.look.config import SheetConfig
from rob.common.store.reader import TargetStore
from rob.common.views.recipes import Crop, get_recipe
from rob.student_train.config import PairingConfig
from rob.student_train.crops import crop_sets
from rob.student_train.objectives import build_objective
from rob.student_train.presets import PRESETS
from rob.student_train.targets.pairing import choose_pairing, plan_views
from rob.student_train.targets.space import TargetSpace
from rob.teacher_cache.registry import TEACHERS
from support.published import TINY
from support.tiny import tiny_beton


class Paper(NamedTuple):
    """A column of the table in docs/papers.md, section 1: facebookresearch/vissl, commit 04788de9."""

    teacher: str
    student: tuple[str, float, float | None]
    """Name, drop path, share of the patches of global crops that are dropped."""
    target: tuple[str, float, int]
    """Objective, temperature, Sinkhorn's rounds over the batch (0: a softmax)."""
    views: tuple[int, int, int]
    """Target views, the student's global crops and its local ones."""
    scales: tuple[tuple[float, float], tuple[float, float]]
    strength: float
    """Of the colours, x .8 .8 .8 .2."""
    blur: tuple[float, float, float]
    """First and second global crop, local crops."""
    solarise: float
    """Second global crop."""
    filter: str
    head: str
    """Its layers, and what the prototypes are."""
    optimiser: tuple[str, float, float, float, float, float]
    """Name, rate for a batch of 256, where its warm-up begins and its cosine ends, weight decay at first and at last."""
    decays_all: bool
    """Biases and BatchNorms, too."""
    length: tuple[int, float, int, float]
    """Epochs, warm-up in epochs, images a step, limit of the gradient (0: any)."""


MLP, SWAV_MLP = "Linear; biases", "Linear BatchNorm1d Linear; frozen"
DINO_HEAD = "Linear GELU Linear GELU Linear, unit; weight norm, "
DINO = Paper(
    "dino_vits16",
    ("vit_tiny_patch16_224", 0.1, None),
    ("dino", 0.07, 0),
    (2, 2, 8),
    ((0.4, 1.0), (0.05, 0.4)),
    0.5,
    (1.0, 0.1, 0.5),
    0.2,
    "bicubic",
    DINO_HEAD + "gain learned",
    ("adamw", 5e-4, 1e-5, 1e-5, 0.04, 0.4),
    False,
    (300, 300 * 0.033, 1024, 0.0),
)
SWAV = Paper(
    "swav_resnet50",
    ("resnet18", 0.0, None),
    ("swav", 0.03, 3),
    (1, 2, 4),
    ((0.14, 1.0), (0.05, 0.14)),
    1.0,
    (0.5, 0.5, 0.5),
    0.0,
    "bilinear",
    "Linear BatchNorm1d ReLU Linear, unit; free rows",
    ("lars", 0.3, 0.3 * 64 * 8 / 256, 0.0048, 1e-6, 1e-6),
    True,
    (100, 100 * 0.1, 4096, 0.0),
)
PAPERS = {
    "rob-dino": DINO,
    "rob-dino-b16": DINO._replace(teacher="dino_vitb16", scales=((0.25, 1.0), (0.05, 0.25))),
    "rob-swav": SWAV,
    "rob-swav-teacher-prototypes": SWAV._replace(head=SWAV_MLP),
    "rob-msn": Paper(
        "msn_vitb16",
        ("vit_tiny_patch16_224", 0.0, 0.1),
        ("msn", 0.025, 0),
        (2, 2, 10),
        ((0.3, 1.0), (0.05, 0.3)),
        1.0,
        (0.5, 0.5, 0.5),
        0.0,
        "bilinear",
        MLP,
        ("adamw", 2.5e-4, 2e-4, 1e-5, 0.04, 0.4),
        False,
        (150, 150 * 0.1, 1024, 1.0),
    ),
    "rob-ibot": Paper(
        "ibot_vitb16",
        ("vit_tiny_patch16_224", 0.0, None),  # iBOT's drop path of .1 is 0 for ViT-Ti
        ("ibot", 0.07, 0),
        (2, 2, 10),
        ((0.25, 1.0), (0.05, 0.25)),
        0.5,
        (1.0, 0.1, 0.5),
        0.2,
        "bicubic",
        DINO_HEAD + "gain learned",
        ("adamw", 5e-4, 1e-5, 1e-5, 0.04, 0.48),
        False,
        (100, 100 * 0.1, 1024, 0.0),
    ),
}


def test_every_preset_of_rob_is_compared():
    assert {name for name in PRESETS if name.startswith("rob-")} == set(PAPERS)


def head_of(objective: Any) -> str:
    layers = " ".join(type(layer).__name__ for layer in objective.head.mlp)
    prototypes = objective.prototypes
    if prototypes.bias is not None:
        return f"{layers}; biases"
    if not next(prototypes.parameters()).requires_grad:
        assert not objective.head.unit
        return f"{layers}; frozen"
    kind = "free rows"
    if prototypes.weight_norm:
        kind = f"weight norm, gain {'learned' if prototypes.weight_g.requires_grad else '1'}"
    elif objective.keeps_lengths:
        kind = "unit rows"
    return f"{layers}{', unit' * objective.head.unit}; {kind}"


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_is_the_papers(name):
    preset, paper = PRESETS[name], PAPERS[name]
    assert preset.momentum is None
    assert "facebookresearch/vissl 04788de9" in preset.source
    config, o = rob.preset(name, Path("data"), Path("out"), rob.Cached(Path("t.zarr"))), preset.optimiser
    assert (config.student.name, config.student.drop_path, config.student.patch_drop) == paper.student
    assert config.student.image_size == 224
    decay_end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    assert (o.name, o.lr, o.warmup_lr, o.min_lr, o.weight_decay, decay_end) == pytest.approx(paper.optimiser)
    assert (o.momentum, o.trust) == (0.9, None)  # LARC's trust is .001, which is what None is
    assert bool(o.decay_all) == paper.decays_all
    assert (config.average, config.clip_each, config.targets) == (
        None,
        None,
        rob.Cached(Path("t.zarr")),
    )  # no copy, one norm
    length = (config.epochs, o.warmup(config.epochs), config.loader.batch_size, config.clip_grad)
    assert length == pytest.approx(paper.length)

    # the objective as it is built, with a teacher whose own temperature and prototypes are others
    space = TargetSpace(8, 6, True, 0.5, prototypes=nn.functional.normalize(torch.randn(6, 8), dim=1))
    objective: Any = build_objective(config.objective, 10, space, paper.views[0], num_images=64)
    assert config.objective.name == paper.target[0]
    assert (objective.teacher_temp, objective.student_temp, objective.mean_entropy) == (paper.target[1], 0.1, 0.0)
    (centre,) = objective.centres
    if paper.target[2]:
        assert (centre.iterations, centre.queue, centre.start) == (paper.target[2], None, "exponentials")
    else:
        assert centre.centre is None
    assert head_of(objective) == paper.head
    assert config.objective.hidden_dim == 2048
    assert objective.head.mlp[0].out_features == 2048
    if paper.target[0] == "swav" and paper.head != SWAV_MLP:
        assert objective.head.out_dim == 128

    recipe = preset.drawn()
    colour = {"jitter": 0.8, "grey": 0.2, "sigma": (0.1, 2.0), "flip": 0.5}
    strengths = (0.8, 0.8, 0.8, 0.2)
    for number in range(2):
        crop = recipe.global_crops[number % len(recipe.global_crops)]
        solarise = paper.solarise * number
        assert crop == Crop(
            224, paper.scales[0], **colour, **jitter(strengths, paper.strength), blur=paper.blur[number], solarise=solarise
        )  # fmt: skip
    assert recipe.local_crop == Crop(
        96, paper.scales[1], **colour, **jitter(strengths, paper.strength), blur=paper.blur[2]
    )
    assert recipe.interpolation == paper.filter
    assert (recipe.num_global, recipe.num_local) == paper.views[1:]  # what rob views draws

    pairing = choose_pairing(config.objective.name, recipe, preset.views, config.pairing)
    plan = plan_views(pairing, preset.views, 0)
    assert (len(plan.targets), len(plan.globals), len(plan.locals)) == paper.views
    assert [crops.size for crops in crop_sets(config, recipe, plan)] == [224, 96]
    own = torch.eye(2) if paper.views[0] == 2 else torch.ones(2, 1)
    pairs = torch.cat([own, torch.ones(paper.views[2], paper.views[0])])
    torch.testing.assert_close(plan.pair_weights, pairs / pairs.sum())


def jitter(strengths: tuple[float, ...], factor: float) -> dict[str, float]:
    named = zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True)
    return {name: value * factor for name, value in named}


# ==== the two commands ====

FAST = ("--loader", "torch", "--workers", 1, "--device", "cpu", "--batch-size", 4)
TINY_RUN = ("--image-size", 32, "--local-size", 16, "--hidden-dim", 16, "--epochs", 2, "--warmup-epochs", 0, *FAST)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    return tiny_beton(tmp_path_factory.mktemp("data"), 8)


def run(*arguments: object) -> str:
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return " ".join(outcome.output.split())


@pytest.fixture
def cache(data, tmp_path, monkeypatch):
    """``cache(preset, *options)``: the store of its teacher, whose published layout has tiny widths."""

    def cached(preset: str, *options: object) -> Path:
        name, store = PAPERS[preset].teacher, tmp_path / f"{preset}.zarr"
        fixture = TINY[name]
        fixture.build(tmp_path / "teacher.pth")
        widths = dict(TEACHERS[name].backbone_args) | fixture.arguments
        monkeypatch.setitem(TEACHERS, name, replace(TEACHERS[name], backbone_args=widths))
        teacher = ("--teacher", name, "--checkpoint", tmp_path / "teacher.pth", "--view-size", fixture.size)
        run("cache-teacher", data.path, store, "--preset", preset, *teacher, *FAST, *options)
        return store

    return cached


@pytest.mark.parametrize("name", PAPERS)
def test_rob_views_draws_its_crops(name, data, tmp_path, monkeypatch):
    drawn: list[SheetConfig] = []
    monkeypatch.setattr("rob.common.look.contact_sheet.contact_sheet", drawn.append)
    run("views", tmp_path / "v.png", "--data", data.path, "--preset", name)
    run("views", tmp_path / "v.png", "--data", data.path, "--preset", name, "--num-local", 1, "--colour", 0)
    usual, changed = (config.recipe for config in drawn)
    assert (usual.num_global, usual.num_local, usual.interpolation) == (*PAPERS[name].views[1:], PAPERS[name].filter)
    assert (usual.global_crops[0].scale, usual.local_crop.scale) == PAPERS[name].scales
    assert (changed.num_local, changed.local_crop.hue, changed.local_crop.scale) == (1, 0, usual.local_crop.scale)


@pytest.mark.parametrize("name", sorted(PAPERS.keys() - {"rob-dino-b16"}))
def test_two_commands_with_the_same_word(name, data, cache, tmp_path):
    store = cache(name)
    manifest = TargetStore.open(store).manifest
    assert manifest.recipe == json.loads(json.dumps(get_recipe(PRESETS[name].recipe).to_dict()))
    assert len(manifest.view_ids) == PRESETS[name].views == 4

    student = "test_resnet" if "swav" in name else "test_vit"
    text = run("train-student", data.path, "--targets", store, "--out", tmp_path / "run", "--preset", name, "--student", student,
        "--no-small-images", "--drop-path", 0, *TINY_RUN)  # fmt: skip
    assert "not used: there" not in text
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert PairingConfig(**written["pairing"]) == choose_pairing(
        PAPERS[name].target[0], PRESETS[name].drawn(), 4, PRESETS[name].pairing
    )
    assert written["objective"]["teacher_temp"] == PAPERS[name].target[1]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert torch.tensor(losses).isfinite().all()
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_what_is_given_beats_the_preset_of_stage_1(cache):
    manifest = TargetStore.open(cache("rob-dino", "--views", 2, "--global-scale", 0.5, 1)).manifest
    assert len(manifest.view_ids) == 2
    assert manifest.recipe["global_crops"][0]["scale"] == [0.5, 1.0]
    assert manifest.recipe["local_crop"]["size"] == 96


def test_a_store_that_the_preset_does_not_fit_is_refused_in_one_sentence(data, cache, tmp_path):
    store, out = cache("rob-dino", "--recipe", "rob-dino-b16", "--views", 1), tmp_path / "run"
    common = (
        "train-student",
        data.path,
        "--targets",
        store,
        "--out",
        out,
        *TINY_RUN,
        "--student",
        "test_vit",
        "--preset",
    )
    message = (
        r"was cached with recipe rob-dino-b16 .*, and preset rob-dino replays .* cache again with rob cache-teacher"
    )
    with pytest.raises(MisuseError, match=message):
        run(*common, "rob-dino")
    with pytest.raises(
        MisuseError, match="holds 1 views of an image and a step uses 2: pass --step-targets 1, or cache"
    ):
        run(*common, "rob-dino-b16")
    assert not out.exists()


def test_a_preset_with_a_teacher_has_no_momentum(data, tmp_path):
    with pytest.raises(MisuseError, match="--preset rob-dino has a frozen teacher: give --targets a store, or online"):
        run("train-student", data.path, "--targets", "momentum", "--out", tmp_path / "run", "--preset", "rob-dino")
    assert not (tmp_path / "run").exists()
    with pytest.raises(MisuseError, match="--head-type mlp is for a frozen teacher's targets"):
        run("train-student", data.path, "--targets", "momentum", "--out", tmp_path / "run", "--head-type", "mlp")


def test_an_unknown_preset_of_stage_1_offers_the_nearest(data, tmp_path):
    with pytest.raises(MisuseError, match="unknown preset 'rob-din': did you mean rob-dino"):
        run("cache-teacher", data.path, tmp_path / "t.zarr", "--teacher", "dino_vits16", "--preset", "rob-din")
