"""A preset sets a run to the values in its paper's code, on the command line and in Python."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rob
from rob.cli import app
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.student_train.crops import crop_sets
from rob.student_train.objectives import CopySettings, build_objective
from rob.student_train.presets import PRESETS
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import MomentumTargets
from rob.student_train.targets.pairing import choose_pairing, plan_views
from rob.student_train.train_config import TrainConfig
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint


class Paper(NamedTuple):
    """What a run has to be set to, from the files named above each."""

    source: str
    optimiser: tuple[str, float, float, float, float, float]
    """Name, rate for a batch of 256, where its cosine ends, epochs of warm-up, weight decay at the start and at the end."""
    length: tuple[int, int, float]
    """Epochs, images a step, largest norm of the gradient (0: any)."""
    copy: tuple[float, float] | None
    """Its momentum at the first step and at the end of the run."""
    student_temp: float | None
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
# src/msn_train.py; .1 sharpened by .25 is .025. The schedules end elsewhere there: presets.py names what differs.
MSN_VIT = Paper(
    "facebookresearch/msn: msn_vits16.yaml",
    optimiser=("adamw", 0.001 * 256 / (64 * 16), 1e-6, 15, 0.04, 0.4),
    length=(800, 64 * 16, 3.0),
    copy=(0.996, 0.9992),
    student_temp=0.1,
    teacher_temp=(0.025, 0.025, 0),
    head=(1024, 2048, True, False, 0),
    crops=((0.3, 1.0), 10, 96, (0.05, 0.3)),
    alpha=1 / 11,
)
# github.com/facebookresearch/dino: main_dino.py, 64 images on each of README.md's 8 GPUs
DINO = DINO_VIT._replace(
    source="facebookresearch/dino: main_dino.py",
    optimiser=("adamw", 0.0005, 1e-6, 10, 0.04, 0.4),
    length=(100, 512, 3.0),
    teacher_temp=(0.04, 0.04, 0),
    head=(65536, 2048, False, False, 1),
    crops=((0.4, 1.0), 8, 96, (0.05, 0.4)),
    alpha=1 / 9,
)
ONE_GLOBAL = {"seed", "simreg", "moco-v2", "moco-cnn", "sslight-moco-cnn", "msn-vit"}
"""The student sees one global crop: that of the target, or with a copy another one."""
PAPERS = {
    "dino": DINO,
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
    # github.com/jacobswan1/SEED: tools/opts.py, main.py (the warm-up), seed/builder.py (a head as wide as ResNet-18's features)
    "seed": MOCO_V2._replace(
        source="jacobswan1/SEED",
        optimiser=("sgd", 0.03, 0.0, 5, 1e-4, 1e-4),
        copy=None,
        teacher_temp=(1e-4, 1e-4, 0),
        head=(0, 512, False, False, 0),
    ),
    # github.com/UCDvision/simreg: run.sh, main.py, mlp_arch.py (a head twice as wide as ResNet-18's features)
    "simreg": Paper(
        "UCDvision/simreg: run.sh",
        optimiser=("sgd", 0.05, 0.0, 0, 1e-4, 1e-4),
        length=(130, 256, 0.0),
        copy=None,
        student_temp=None,
        teacher_temp=None,
        head=(0, 1024, True, False, 0),
        crops=((0.2, 1.0),),
        alpha=1.0,
    ),
    # github.com/facebookresearch/dinov3: train/dinov3_vitl16_lvd1689m_distilled.yaml; rate and weight decay are those of 1024
    # images. Crops are 256 and 112 px there, and the average's decay moves: presets.py names what differs.
    "dinov3-distilled": Paper(
        "facebookresearch/dinov3: dinov3_vitl16_lvd1689m_distilled.yaml",
        optimiser=("adamw", 0.0002, 1e-6, 10, 0.04, 0.04),
        length=(100, 1024, 3.0),
        copy=None,
        student_temp=0.1,
        teacher_temp=(0.07, 0.07, 0),
        head=(0, 2048, False, True, 0),
        crops=((0.32, 1.0), 8, 96, (0.05, 0.32)),
        alpha=1 / 9,
    ),
}


class Reached(Exception):
    """With what the command hands over to the training."""


@pytest.mark.parametrize("name", PAPERS)
def test_a_run_is_set_to_the_papers_values(name, tmp_path, monkeypatch):
    def hand_over(config: TrainConfig, progress: Any) -> None:
        raise Reached(config)

    monkeypatch.setattr("rob.student_train.train.train_student", hand_over)
    data, paper = tiny_beton(tmp_path, 8), PAPERS[name]
    arguments = ["train-student", data.path, "--out", tmp_path / "run", "--preset", name, "--device", "cpu"]
    taught = PRESETS[name].momentum is None
    if taught:
        teacher = tiny_teacher_checkpoint(tmp_path, prototypes=10)
        arguments += ["--targets", tiny_store(tmp_path / "t.zarr", data, teacher, recipe=PRESETS[name].drawn()).path]
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(outcome.exception, Reached), (outcome.exception, outcome.output)
    (config,) = outcome.exception.args
    run = RunContext(Beton(config.data), torch.device("cpu"), seed=config.seed, objective=config.objective)
    branch = config.targets.open(run)
    pairing = choose_pairing(config.objective.name, branch.recipe, branch.views, config.pairing, branch.from_student)
    config = replace(config, pairing=pairing)
    assert paper.source in PRESETS[name].source

    o, decay = config.optimiser, config.optimiser.weight_decay
    decay_end = decay if o.weight_decay_end is None else o.weight_decay_end
    assert (o.name, o.lr, o.min_lr, o.warmup(config.epochs), decay, decay_end) == paper.optimiser
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
    assert getattr(objective, "student_temp", None) == paper.student_temp
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
    assert (len(plan.globals), sides[0]) == (1 if name in ONE_GLOBAL else 2, 224)
    assert len(plan.targets) == len(plan.globals)
    assert (plan.targets == plan.globals) == (
        (branch.from_student and name not in ONE_GLOBAL) or config.pairing.replays
    )
    assert {crop.scale for crop in branch.recipe.global_crops} == {paper.crops[0]}
    if plan.locals:
        assert (len(plan.locals), sides[1], branch.recipe.local_crop.scale) == paper.crops[1:]
    else:
        assert not paper.crops[1:]
    assert plan.pair_weights[: len(plan.globals)].sum().item() == pytest.approx(paper.alpha, abs=1e-6)

    in_python = rob.preset(name, config.data, config.out, config.targets if taught else None)
    paired = choose_pairing(config.objective.name, branch.recipe, branch.views, in_python.pairing, branch.from_student)
    assert replace(in_python, pairing=paired, device="cpu") == replace(config, targets=in_python.targets)
    assert taught or in_python.targets == config.targets


@pytest.mark.parametrize("name", sorted(name for name, preset in PRESETS.items() if preset.momentum))
def test_a_store_has_no_copy_whose_views_a_preset_could_set(name):
    pairing = rob.preset(name, targets=rob.Cached("t.zarr")).pairing
    assert (pairing.step_targets, pairing.fresh) == (None, None)
    assert pairing.num_local == PRESETS[name].pairing.num_local


def test_dinov3s_distillation_balances_spreads_and_averages(tmp_path):
    """What its row above does not say: the same yaml."""
    config = PRESETS["dinov3-distilled"]
    assert (config.objective.sinkhorn, config.objective.koleo, config.objective.head) == ("batch", 0.1, "fresh")
    data, teacher = tiny_beton(tmp_path, 16), tiny_teacher_checkpoint(tmp_path, prototypes=10)
    store = tiny_store(tmp_path / "t.zarr", data, teacher, recipe=config.drawn())
    run = rob.preset("dinov3-distilled", data.path, tmp_path / "run", rob.Cached(store.path))
    run = replace(
        run, student=rob.StudentConfig("test_vit", 32), objective=replace(run.objective, hidden_dim=16, bottleneck=8), epochs=2,
        pairing=replace(run.pairing, num_local=1), local_size=16, loader=rob.LoaderConfig("torch", 8, 1), device="cpu",
    )  # fmt: skip
    rob.train_student(run)
    told = json.loads((run.out / "config.json").read_text())
    assert (told["average"], told["pairing"]["pairing"], told["pairing"]["fresh"]) == (0.999, "cross", False)
    assert (run.out / "student_average.safetensors").exists()


def test_a_preset_is_a_configuration_to_be_changed(tmp_path):
    data, out = tiny_beton(tmp_path, 16).path, tmp_path / "run"
    config = rob.preset("sslight-moco-cnn", data, out)
    config = replace(
        config, student=rob.StudentConfig("test_resnet", 32), objective=replace(config.objective, hidden_dim=16), epochs=2,
        pairing=replace(config.pairing, num_local=1), loader=rob.LoaderConfig("torch", 8, 1), device="cpu",
    )  # fmt: skip
    rob.train_student(config)
    written = json.loads((out / "config.json").read_text())
    assert written["recipe"]["name"] == "sslight"
    assert written["optimiser"]["name"] == "lars"
    assert (written["pairing"]["num_local"], written["pairing"]["global_weight"]) == (1, 0.4)


def test_a_paper_with_a_teacher_needs_targets(tmp_path):
    with pytest.raises(MisuseError, match="preset disco needs `targets`"):
        rob.preset("disco", tmp_path / "data.beton", tmp_path / "run")
