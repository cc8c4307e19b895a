"""``--preset``: its values are options, an option that is given beats it, and a store keeps its own views."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from rob.cli import app
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.views.recipes import get_recipe
from rob.student_train.crops import crop_sets
from rob.student_train.objectives import CopySettings, build_objective
from rob.student_train.presets import PRESETS, get_preset
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import MomentumTargets
from rob.student_train.targets.pairing import plan_views
from rob.student_train.train_config import TrainConfig
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

SMALL = ("--student", "test_resnet", "--image-size", 32, "--hidden-dim", 16, "--batch-size", 8, "--epochs", 4)
SMALL = (*SMALL, "--warmup-epochs", 0, "--loader", "torch", "--workers", 1, "--device", "cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_options_and_values_that_train_student_takes(name, tmp_path):
    known = {parameter.name for parameter in typer.main.get_command(app).commands["train-student"].params}
    assert PRESETS[name].options().keys() - known == set()
    assert "recipe" in PRESETS[name].options()
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset", name]
    outcome = CliRunner().invoke(app, arguments + (["--targets", "t.zarr"] if name == "disco" else []))
    assert isinstance(outcome.exception, MisuseError), outcome.output  # and so all values could be read
    assert "nowhere.beton" in str(outcome.exception)
    for option in PRESETS[name].options():
        assert f"--{option.replace('_', '-')} " in outcome.output


def test_sslight_changes_the_views_and_their_weight_and_nothing_else():
    # The recipe dino has the scales of the ViTs' baseline; those of the CNNs' are options.
    areas = {"global_scale", "local_scale"}
    for ours, usual, scales in (
        ("sslight-cnn", "dino-cnn", areas),
        ("sslight-vit", "dino-vit", set()),
        ("sslight-swav-cnn", "swav-cnn", set()),  # the recipe swav has its baseline's scales
        ("sslight-moco-cnn", "moco-cnn", areas),
    ):
        ours, usual = PRESETS[ours].options(), PRESETS[usual].options()
        changed = {name for name in ours.keys() | usual.keys() if ours.get(name) != usual.get(name)}
        assert changed == {"recipe", "global_weight"} | scales


def test_names_are_whole_in_a_narrow_terminal(tmp_path):
    arguments = ["train-student", "nowhere.beton", "--out", str(tmp_path / "run"), "--preset", "dino-vit"]
    outcome = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*arguments, "--objective", "swav"])
    assert "--warmup-teacher-temp-epochs " in outcome.output


def test_an_unknown_preset_offers_the_nearest():
    with pytest.raises(MisuseError, match="unknown preset 'sslite-cnn': did you mean sslight-cnn"):
        get_preset("sslite-cnn")


# ==== the papers' values ====


class Paper(NamedTuple):
    """What a run has to be set to, from the files named above each."""

    source: str
    optimiser: tuple[str, float, float, float, float, float]
    """Name, rate for a batch of 256, where its cosine ends, epochs of warm-up, weight decay at the start and at the end."""
    length: tuple[int, int, float]
    """Epochs, images a step, largest norm of the gradient (0: any)."""
    copy: tuple[float, float] | None
    """Its momentum at the first step and at the end of the run."""
    student_temp: float
    teacher_temp: tuple[float, float, int] | None
    """At first, at last, and the epochs from one to the other."""
    head: tuple[int, int, bool, bool, int]
    """Prototypes, hidden width, BatchNorm, lengths of prototypes learned, epochs in which the prototypes stay."""
    crops: tuple[tuple[float, float], int, int, tuple[float, float]] | tuple[tuple[float, float]]
    """Area of the global crops; number, side in pixels and area of the local ones."""
    alpha: float
    """What the pairs of two global crops weigh."""


# github.com/saic-fi/SSLight, src/config/exp_yamls, and for what these leave out src/config/defaults.py; 128 images on 8 GPUs
DINO_CNN = Paper(  # dino/dino_cnn_baseline.yaml
    "saic-fi/SSLight: dino_cnn_baseline.yaml",
    optimiser=("lars", 0.48, 0.0048, 10, 1e-6, 1e-6),
    length=(200, 1024, 0.0),
    copy=(0.996, 1.0),
    student_temp=0.1,
    teacher_temp=(0.04, 0.07, 50),
    head=(4096, 2048, True, False, 1),
    crops=((0.14, 1.0), 6, 96, (0.05, 0.14)),
    alpha=0.142857,
)
DINO_VIT = Paper(  # dino/dino_vit_baseline.yaml
    "saic-fi/SSLight: dino_vit_baseline.yaml",
    optimiser=("adamw", 0.0005, 0.00001, 10, 0.04, 0.4),
    length=(200, 1024, 0.0),
    copy=(0.996, 1.0),
    student_temp=0.1,
    teacher_temp=(0.04, 0.07, 30),
    head=(65536, 2048, False, True, 1),
    crops=((0.25, 1.0), 10, 96, (0.05, 0.25)),
    alpha=0.090909,
)
SWAV_CNN = Paper(  # swav/swav_cnn_baseline.yaml; EPSILON stands where DINO has a teacher's temperature
    "saic-fi/SSLight: swav_cnn_baseline.yaml",
    optimiser=("lars", 0.3, 0.0048, 10, 1e-6, 1e-6),
    length=(200, 1024, 0.0),
    copy=None,
    student_temp=0.1,
    teacher_temp=(0.05, 0.05, 0),
    head=(3000, 4096, True, False, 1),
    crops=((0.14, 1.0), 6, 96, (0.05, 0.14)),
    alpha=0.142857,
)
MOCO_CNN = Paper(  # moco/moco_cnn_baseline.yaml; of its two momenta, src/sslight/model/moco.py reads MOCO.MOMENTUM
    "saic-fi/SSLight: moco_cnn_baseline.yaml",
    optimiser=("lars", 0.48, 0.0048, 10, 1e-6, 1e-6),
    length=(200, 1024, 0.0),
    copy=(0.999, 0.999),
    student_temp=0.2,
    teacher_temp=None,
    head=(0, 2048, False, False, 0),
    crops=((0.14, 1.0), 6, 96, (0.05, 0.14)),
    alpha=0.142857,
)
MOCO_V2 = Paper(  # github.com/facebookresearch/moco: main_moco.py with README.md's --mlp --moco-t 0.2 --aug-plus --cos
    "facebookresearch/moco: README.md",
    optimiser=("sgd", 0.03, 0.0, 0, 1e-4, 1e-4),
    length=(200, 256, 0.0),
    copy=(0.999, 0.999),
    student_temp=0.2,
    teacher_temp=None,
    head=(0, 2048, False, False, 0),
    crops=((0.2, 1.0),),
    alpha=1.0,
)
# github.com/facebookresearch/msn: configs/pretrain/msn_vits16.yaml, 64 images on each of README.md's 16 GPUs; the copy in
# src/msn_train.py; .1 sharpened by .25 is .025. The warm-up is 15 there, and ends elsewhere: presets.py names what differs.
MSN_VIT = Paper(
    "facebookresearch/msn: msn_vits16.yaml",
    optimiser=("adamw", 0.001 * 256 / (64 * 16), 1e-6, 10, 0.04, 0.4),
    length=(800, 64 * 16, 3.0),
    copy=(0.996, 0.9992),
    student_temp=0.1,
    teacher_temp=(0.025, 0.025, 0),
    head=(1024, 2048, True, False, 0),
    crops=((0.3, 1.0), 10, 96, (0.05, 0.3)),
    alpha=1 / 11,
)
PAPERS = {
    "dino-cnn": DINO_CNN,
    "dino-vit": DINO_VIT,
    # dino/dino_cnn_sslight.yaml, with the crops and LAMBDAS of moco/moco_cnn_sslight.yaml
    "sslight-cnn": DINO_CNN._replace(
        source="saic-fi/SSLight: dino_cnn_sslight.yaml", crops=((0.3, 1.0), 6, 128, (0.05, 0.3)), alpha=0.4
    ),
    # dino/dino_vit_sslight.yaml
    "sslight-vit": DINO_VIT._replace(
        source="saic-fi/SSLight: dino_vit_sslight.yaml", crops=((0.3, 1.0), 10, 128, (0.05, 0.3)), alpha=0.4
    ),
    "swav-cnn": SWAV_CNN,
    # swav/swav_cnn_sslight.yaml
    "sslight-swav-cnn": SWAV_CNN._replace(
        source="saic-fi/SSLight: swav_cnn_sslight.yaml", crops=((0.3, 1.0), 6, 128, (0.05, 0.3)), alpha=0.4
    ),
    "moco-cnn": MOCO_CNN,
    # moco/moco_cnn_sslight.yaml
    "sslight-moco-cnn": MOCO_CNN._replace(
        source="saic-fi/SSLight: moco_cnn_sslight.yaml", crops=((0.3, 1.0), 6, 128, (0.05, 0.3)), alpha=0.4
    ),
    "moco-v2": MOCO_V2,
    "msn-vit": MSN_VIT,
    # github.com/Yuting-Gao/DisCo-pytorch: DisCo/main.py with DisCo/README.md's options; the keys are the teacher's here
    "disco": MOCO_V2._replace(source="Yuting-Gao/DisCo-pytorch", copy=None),
}


class Reached(Exception):
    """With what the command hands over to the training."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_is_set_to_the_papers_values(name, tmp_path, monkeypatch):
    def hand_over(config: TrainConfig, progress: Any) -> None:
        raise Reached(config)

    monkeypatch.setattr("rob.student_train.train.train_student", hand_over)
    data, paper = tiny_beton(tmp_path, 8), PAPERS[name]
    arguments = ["train-student", data.path, "--out", tmp_path / "run", "--preset", name, "--device", "cpu"]
    if name == "disco":
        teacher = tiny_teacher_checkpoint(tmp_path)
        arguments += ["--targets", tiny_store(tmp_path / "t.zarr", data, teacher, recipe=get_recipe("moco-v2")).path]
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(outcome.exception, Reached), (outcome.exception, outcome.output)
    (config,) = outcome.exception.args
    run = RunContext(Beton(config.data), torch.device("cpu"), seed=config.seed, objective=config.objective)
    branch = config.targets.open(run)
    assert paper.source in PRESETS[name].source

    o, decay = config.optimiser, config.optimiser.weight_decay
    decay_end = decay if o.weight_decay_end is None else o.weight_decay_end
    assert (o.name, o.lr, o.min_lr, o.warmup_epochs, decay, decay_end) == paper.optimiser
    assert o.momentum == 0.9
    assert (config.epochs, config.loader.batch_size, config.clip_grad) == paper.length

    copy = branch.settings if isinstance(branch, MomentumTargets) else CopySettings(copy_momentum=None)
    if paper.copy is None:
        assert copy.copy_momentum is None
    else:
        branch.total_steps = 1000
        assert (branch.momentum(0), branch.momentum(1000)) == pytest.approx(paper.copy, abs=1e-9)

    # the objective as it is built, but for two prototypes and a short queue
    space = replace(branch.space, num_prototypes=min(2, branch.space.num_prototypes))
    objective: Any = build_objective(config.objective, 8, space, config.pairing.step_targets, num_images=64)
    assert objective.student_temp == paper.student_temp
    if paper.teacher_temp is None:
        assert objective.teacher_temp is None
    else:
        warmup = copy.warmup_teacher_temp_epochs
        first = copy.warmup_teacher_temp if warmup else objective.teacher_temp
        assert (first, objective.teacher_temp, warmup) == paper.teacher_temp
    norm = any(isinstance(layer, nn.BatchNorm1d) for layer in objective.head.mlp)
    learned = any(p.requires_grad for n, p in objective.named_parameters() if n == "prototypes.weight_g")
    freeze = branch.freeze_prototypes if config.freeze_prototypes is None else config.freeze_prototypes
    assert (copy.prototypes, objective.head.mlp[0].out_features, norm, learned, freeze) == paper.head

    plan = plan_views(config.pairing, branch.views, 0)
    sides = [crops.size for crops in crop_sets(config, branch.recipe, plan)]
    assert (len(plan.globals), sides[0]) == (2, 224)
    assert {crop.scale for crop in branch.recipe.global_crops} == {paper.crops[0]}
    if plan.locals:
        assert (len(plan.locals), sides[1], branch.recipe.local_crop.scale) == paper.crops[1:]
    else:
        assert not paper.crops[1:]
    assert plan.pair_weights[:2].sum().item() == pytest.approx(paper.alpha, abs=1e-6)


# ==== runs ====


@pytest.fixture
def train(tmp_path) -> Callable[..., tuple[dict[str, Any], str]]:
    """``train(*options)``: the configuration of a tiny run, and what it printed."""
    data = tiny_beton(tmp_path, 16).path

    def run(*options: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        outcome = CliRunner().invoke(app, [*map(str, ("train-student", data, "--out", out, *SMALL, *options))])
        if outcome.exception and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        assert outcome.exit_code == 0, outcome.output
        return json.loads((out / "config.json").read_text()), " ".join(outcome.output.split())

    return run


def test_what_is_given_beats_the_preset_which_beats_the_defaults(train):
    config, text = train("--preset", "sslight-cnn", "--prototypes", 12, "--copy-momentum", 0.9, "--lr", 0.1)
    assert config["objective"]["name"] == "dino"
    assert config["branch"]["kind"] == "momentum"
    assert (config["branch"]["prototypes"], config["branch"]["copy_momentum"]) == (12, 0.9)
    assert config["branch"]["warmup_teacher_temp_epochs"] == 50
    optimiser = config["optimiser"]
    assert (optimiser["name"], optimiser["lr"], optimiser["weight_decay"]) == ("lars", 0.1, 1e-6)
    assert (optimiser["min_lr"], config["clip_grad"], config["freeze_prototypes"]) == (0.0048, 0.0, 1)
    assert (config["pairing"]["global_weight"], config["pairing"]["num_local"]) == (0.4, 6)
    assert config["recipe"]["name"] == "sslight"
    assert "--lr │ 0.48 │ given: 0.1 x 8/256 = 0.003125" in text
    assert "--prototypes │ 4096 │ given: 12" in text
    assert "--global-weight │ 0.4 │ │" in text


def test_an_option_beats_the_preset_on_either_side_of_it(train):
    for options in (("--num-local", 1, "--preset", "moco-v2"), ("--preset", "moco-v2", "--num-local", 1)):
        # moco-v2's crops are global alone: dino's are asked for with them
        config, _ = train(*options, "--recipe", "dino")
        assert config["pairing"]["num_local"] == 1
        assert config["optimiser"]["name"] == "sgd"


def test_another_recipe_is_not_changed_by_the_presets_scales(train):
    config, text = train("--preset", "dino-cnn", "--recipe", "sslight", "--prototypes", 12, "--num-local", 1)
    assert config["recipe"] == json.loads(json.dumps(get_recipe("sslight").to_dict()))
    assert config["pairing"]["global_weight"] == 0.4
    assert "--global-scale │ 0.14 1 │ not used: recipe sslight has" in text
    usual, _ = train("--preset", "sslight-cnn", "--recipe", "dino", "--prototypes", 12, "--num-local", 1)
    assert usual["pairing"]["global_weight"] is None


def test_a_store_keeps_its_views_and_gets_the_presets_local_crops(train, tmp_path):
    data = tiny_beton(tmp_path, 16)
    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=12)
    store = tiny_store(tmp_path / "targets.zarr", data, teacher, recipe=get_recipe("dino"))
    config, text = train("--preset", "sslight-cnn", "--targets", store.path)
    assert config["branch"]["kind"] == "cached"
    dino, sslight = (json.loads(json.dumps(get_recipe(name).to_dict())) for name in ("dino", "sslight"))
    assert config["recipe"]["global_crops"] == dino["global_crops"]
    assert config["recipe"]["local_crop"] == sslight["local_crop"]
    assert (config["pairing"]["num_local"], config["pairing"]["global_weight"]) == (6, 0.4)
    assert (
        "was cached with recipe dino (global crops of 0.25 to 1 of the image) and the preset has recipe sslight" in text
    )
    for row in ("--prototypes │ 4096", "--copy-momentum │ 0.996", "--warmup-teacher-temp-epochs │ 50"):
        assert f"{row} │ not used: there is no copy" in text
    assert "--recipe │ sslight │ not used: the store has its own" in text
    assert text.count("not used") == 4

    ours = tiny_store(tmp_path / "ours.zarr", data, teacher, recipe=get_recipe("sslight"))
    config, _ = train("--preset", "dino-cnn", "--targets", ours.path)
    assert config["pairing"]["global_weight"] is None
    assert config["recipe"]["local_crop"]["size"] == 96

    config, text = train("--preset", "dino-vit", "--targets", store.path, "--local-scale", 0.1, 0.2)
    assert config["recipe"]["local_crop"] == dino["local_crop"] | {"scale": [0.1, 0.2]}
    assert "was cached with" not in text

    for option, value in (("--global-scale", (0.5, 1)), ("--colour", (0.5,)), ("--solarise", (0,))):
        message = f"{option} is for --targets online or momentum; the store .*targets.zarr has targets of its own views"
        with pytest.raises(MisuseError, match=message):
            train("--targets", store.path, option, *value)


def test_another_objective_leaves_out_what_it_does_not_read_of_the_preset(train, tmp_path):
    swav, text = train("--preset", "dino-cnn", "--objective", "swav", "--prototypes", 12, "--epochs", 1)
    assert (swav["objective"]["name"], swav["branch"]["copy_momentum"]) == ("swav", None)
    assert swav["branch"]["warmup_teacher_temp_epochs"] == 0
    assert "--copy-momentum │ 0.996 │ not used: swav does not read it" in text
    assert "--warmup-teacher-temp-epochs │ 50 │ not used: swav does not read it" in text
    assert text.count("not used") == 2

    moco, text = train("--preset", "dino-cnn", "--objective", "moco", "--epochs", 1)
    assert (moco["objective"]["name"], moco["branch"]["prototypes"], moco["freeze_prototypes"]) == ("moco", 0, 0)
    assert moco["branch"]["copy_momentum"] == 0.996  # what it can read is the preset's
    assert "--prototypes │ 4096 │ not used: moco does not read it" in text

    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=12)
    store = tiny_store(tmp_path / "targets.zarr", tiny_beton(tmp_path, 16), teacher)
    same, text = train("--preset", "sslight-cnn", "--targets", store.path, "--objective", "embedding", "--epochs", 1)
    assert (same["pairing"]["num_local"], same["pairing"]["global_weight"]) == (0, None)
    assert "--num-local │ 6 │ not used: there are no local crops" in text
    assert "--global-weight │ 0.4 │ not used: there are no local crops" in text
    train("--preset", "dino-cnn", "--recipe", "moco-v2", "--prototypes", 12, "--epochs", 1)

    # what is typed is refused as ever
    with pytest.raises(MisuseError, match="--copy-momentum: --objective swav makes its targets without a copy"):
        train("--preset", "dino-cnn", "--objective", "swav", "--copy-momentum", 0.996)
    with pytest.raises(MisuseError, match="--prototypes is for --targets momentum; a teacher has its own"):
        train("--preset", "dino-cnn", "--targets", store.path, "--prototypes", 4096)


@pytest.mark.parametrize(("name", "learned"), [("sslight-cnn", False), ("dino-vit", True), ("sslight-vit", True)])
def test_dinos_vits_learn_the_length_of_a_prototype(train, tmp_path, name, learned):
    train("--preset", name, "--prototypes", 12, "--num-local", 1, "--epochs", 2, "--lr", 0.1, "--copy-momentum", 0.5)
    state = torch.load(tmp_path / "run0" / "checkpoint.pt", weights_only=True)["state"]
    for branch in ("model", "momentum"):  # the copy follows the student
        lengths = state[branch]["objective.prototypes.weight_g"]
        assert torch.equal(lengths, torch.ones(12, 1)) != learned
    for objective in ("msn", "swav", "moco"):
        with pytest.raises(MisuseError, match=f"--norm-last-layer means nothing to --objective {objective}: it is for"):
            train("--targets", "momentum", "--objective", objective, "--no-norm-last-layer")


def test_a_view_is_changed_by_its_options(train):
    momentum = ("--targets", "momentum", "--objective", "moco")
    config, _ = train(*momentum, "--recipe", "sslight", "--local-scale", 0.1, 0.2, "--num-local", 1, "--flip", 0)
    assert config["recipe"]["local_crop"]["scale"] == [0.1, 0.2]
    assert config["recipe"]["local_crop"]["flip"] == 0
    assert [crop["scale"] for crop in config["recipe"]["global_crops"]] == [[0.3, 1.0]] * 2
    with pytest.raises(MisuseError, match="--local-scale: recipe moco-v2 has no local crops"):
        train(*momentum, "--recipe", "moco-v2", "--local-scale", 0.1, 0.2)
    with pytest.raises(MisuseError, match="--copy-momentum: --objective swav makes its targets without a copy"):
        train("--targets", "momentum", "--objective", "swav", "--copy-momentum", 0.9)
    with pytest.raises(MisuseError, match="--warmup-teacher-temp-epochs: --objective moco has no warm-up"):
        train(*momentum, "--warmup-teacher-temp-epochs", 2)


def test_the_help_names_every_preset():
    text = re.sub(r"\s", "", CliRunner().invoke(app, ["train-student", "--help"]).output)
    for name in PRESETS:
        assert re.search(rf"[:,]{name}[,.]", text), name
