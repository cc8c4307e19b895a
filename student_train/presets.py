"""A paper's settings in one word: ``rob train-student --preset NAME``, or ``rob.preset(NAME, data, out)``; for a paper with a
frozen teacher ``rob cache-teacher --preset NAME`` before it.

An option that the user gives beats it, and ``dataclasses.replace`` what ``rob.preset`` gives. Learning rates are for a
batch of 256 and are scaled to the batch at hand, as the papers do. What a preset leaves out is the same in the paper as by
default: 10 epochs of warm-up in 100 and more (a tenth of fewer), momentum .9, temperatures, the lengths of queues.

What is not as in the papers' code:

- All: bfloat16 on GPUs that have it (``--precision fp32``; SSLight's and MoCo's code is float32), and the last BatchNorm of a
  residual branch starts at 0, in MoCo's, DisCo's, SEED's, SimReg's and SSLight's CNNs at 1.
- MobileNetV3: the feature is what its last layer before the classifier gives (1280 numbers for Large), RoB's what is pooled
  before it (960); BatchNorms are not decayed, RoB's are (``--decay-all`` decays biases, too).
- SwAV: the queue has 3840 rows, there as many whole batches as they hold, 3072. As there, it begins to fill in epoch 15, but for
  a frozen teacher's targets: those serve at once.
- MoCo-v2 lowers its rate once an epoch, here every step. SSLight's MoCo shuffles the keys over 8 GPUs
  (``--split-batchnorm 8``), and its key is always of the first of the two kinds of global crops, here of both in turn.
- MSN: the rate and the weight decay have run their cosines when the run ends, there four fifths of them (to 1e-4 and .37). Decay
  and the limit of the gradient hold for the prototypes too.
- RoB: a store gives the same few target views again and again, there they are new in every epoch (--targets online, with many
  ``--views``, does that too). Rate and weight decay move every step, there once an epoch but for SwAV. DINO's and iBOT's crops
  are bicubic as in those papers' own code, there bilinear (--targets online with ``--interpolation bilinear``). A plain MLP
  begins as DINO's head does, there as torch's linear layers. iBOT has its loss of hidden patches where the targets have
  patches: online, or from a store that was cached with ``--patches``.
- DisCo: as MoCo-v2, and the keys' BatchNorm sees the batch as it is.
- SimReg: the teacher's embedding is what was cached, there always the pooled feature.
- DINOv3's distillation: the class token's part alone, without iBOT's patches; prototypes are those of the store, few against
  262144; crops of 224 and 96 px, there 256 and 112; the average's decay rises to .999, in 31,600 steps, there from .994 to 1;
  the limit of the gradient is for backbone and head together, there for each.
- SSLight's CNNs: depthwise convolutions are decayed, there they are not.
- ViTs: position embeddings and class token are not decayed, there they are.

With ``--targets CACHE.zarr`` a preset sets the same, but for what concerns the copy of the student; the global crops are
those that the targets were cached with. With another ``--objective`` it sets what that one reads.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import MisuseError, unknown_name
from ..common.settings import described
from ..common.views.config import LoaderConfig
from ..common.views.recipes import Recipe, RecipeOverrides, get_recipe
from .config import OptimiserConfig, PairingChoice
from .objectives import ObjectiveConfig
from .student_config import StudentConfig
from .targets.config import TargetsConfig
from .targets.momentum import Momentum
from .targets.with_copy import WithCopy
from .train_config import TrainConfig

AS_THE_RECIPE, AS_THE_PAPER = RecipeOverrides(), PairingChoice()


@dataclass(frozen=True)
class Preset:
    """What a paper sets; what is None is as by default. ``source`` is where the values stand.

    Views are drawn as ``recipe`` says, with ``areas`` instead of its own. ``momentum`` None: the paper has a teacher, and
    ``with_copy`` a copy of the student beside it. ``views`` is how many of an image ``rob cache-teacher`` stores: training
    rotates through them.
    """

    source: str
    student: StudentConfig
    objective: ObjectiveConfig
    momentum: Momentum | None
    optimiser: OptimiserConfig
    recipe: str
    areas: RecipeOverrides = AS_THE_RECIPE
    pairing: PairingChoice = AS_THE_PAPER
    freeze_prototypes: int | None = None
    epochs: int = 200
    batch_size: int = 1024
    clip_grad: float = 0.0
    clip_each: bool | None = None
    average: float | None = None
    views: int = 4
    with_copy: bool | None = None

    def drawn(self) -> Recipe:
        """How it draws views."""
        return get_recipe(self.recipe, self.areas)

    def options(self) -> dict[str, Any]:
        """What it sets of ``rob train-student``, by the names of the parameters."""
        named = {"objective": self.objective.name, "recipe": self.recipe, "freeze_prototypes": self.freeze_prototypes}
        named |= {"epochs": self.epochs, "batch_size": self.batch_size}
        named |= {"clip_grad": self.clip_grad, "clip_each": self.clip_each}
        named |= {"targets": None if self.momentum is None else ("momentum",), "average": self.average}
        named |= {"with_copy": self.with_copy}
        for part in (self.student, self.objective, self.momentum, self.optimiser, self.areas, self.pairing):
            if part is not None:
                named |= {setting.name: setting.default for setting in described(type(part), part)}
        return {name: value for name, value in named.items() if value is not None}


LARS = OptimiserConfig("lars", lr=0.48, min_lr=0.0048, weight_decay=1e-6)
ADAMW = OptimiserConfig("adamw", lr=5e-4, min_lr=1e-5, weight_decay=0.04, weight_decay_end=0.4)
SGD = OptimiserConfig("sgd", lr=0.03, min_lr=0.0, weight_decay=1e-4, warmup_epochs=0.0, decay_all=True)
CNN_AREAS = RecipeOverrides(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14))
CUBIC = RecipeOverrides(interpolation="bicubic")
SIX, TEN = PairingChoice(num_local=6), PairingChoice(num_local=10)
ONE_KEY: dict[str, Any] = {"step_targets": 1, "fresh": True}
"""The copy sees one global crop, the student another."""
SSLIGHT_SIX, SSLIGHT_TEN = replace(SIX, global_weight=0.4), replace(TEN, global_weight=0.4)

DINO = Preset(
    "DINO (2104.14294), facebookresearch/dino: main_dino.py, on the 8 GPUs of README.md",
    StudentConfig("vit_small_patch16_224", drop_path=0.1),
    ObjectiveConfig("dino", teacher_temp=0.04, head_norm=False),
    Momentum(prototypes=65536, copy_momentum=0.996, warmup_teacher_temp_epochs=0),
    replace(ADAMW, min_lr=1e-6),
    recipe="dino",
    areas=RecipeOverrides(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)),
    pairing=PairingChoice(num_local=8),
    freeze_prototypes=1,
    epochs=100,
    batch_size=512,
    clip_grad=3.0,
    clip_each=True,
)
DINO_CNN = Preset(
    "SSLight's baseline, saic-fi/SSLight: dino_cnn_baseline.yaml",
    StudentConfig("resnet18"),
    ObjectiveConfig("dino", head_norm=True),
    Momentum(prototypes=4096, copy_momentum=0.996, warmup_teacher_temp_epochs=50),
    LARS,
    recipe="dino",
    areas=CNN_AREAS,
    pairing=SIX,
    freeze_prototypes=1,
)
DINO_VIT = Preset(
    "SSLight's baseline, saic-fi/SSLight: dino_vit_baseline.yaml",
    StudentConfig("vit_tiny_patch16_224", drop_path=0.1),
    ObjectiveConfig("dino", head_norm=False, norm_last_layer=False),
    Momentum(prototypes=65536, copy_momentum=0.996, warmup_teacher_temp_epochs=30),
    ADAMW,
    recipe="dino",
    pairing=TEN,
    freeze_prototypes=1,
)
SWAV_CNN = Preset(
    "SSLight's baseline, saic-fi/SSLight: swav_cnn_baseline.yaml",
    StudentConfig("mobilenetv2_100"),
    ObjectiveConfig("swav", hidden_dim=4096, head_norm=True),
    Momentum(prototypes=3000),
    replace(LARS, lr=0.3, warmup_lr=0.075),
    recipe="swav",
    areas=CUBIC,  # SSLight's code crops all its methods alike
    pairing=SIX,
    freeze_prototypes=1,
)
MOCO_CNN = Preset(
    "SSLight's baseline, saic-fi/SSLight: moco_cnn_baseline.yaml",
    StudentConfig("mobilenetv2_100"),
    ObjectiveConfig("moco", head_norm=False),
    Momentum(copy_momentum=0.999),
    LARS,
    recipe="dino",
    areas=CNN_AREAS,
    pairing=replace(SIX, **ONE_KEY),
)
MOCO_V2 = Preset(
    "MoCo-v2 (2003.04297), facebookresearch/moco: README.md",
    StudentConfig("resnet50"),
    ObjectiveConfig("moco", head_norm=False),
    Momentum(copy_momentum=0.999, split_batchnorm=8),
    SGD,
    recipe="moco-v2",
    pairing=PairingChoice(**ONE_KEY, num_local=0),
    batch_size=256,
)
MSN_VIT = Preset(
    "MSN (2204.07141), facebookresearch/msn: msn_vits16.yaml, whose rate of .001 is for a batch of 1024",
    StudentConfig("deit_small_patch16_224", patch_drop=0.15),
    ObjectiveConfig("msn", head_norm=True, norm_by_size=True),
    Momentum(prototypes=1024, copy_momentum=0.996),
    replace(ADAMW, lr=2.5e-4, min_lr=1e-6, warmup_epochs=15.0, warmup_lr=2e-4),
    recipe="msn",
    pairing=replace(TEN, **ONE_KEY),
    freeze_prototypes=0,
    epochs=800,
    clip_grad=3.0,
)
DISCO = Preset(
    "DisCo (2104.09124), Yuting-Gao/DisCo-pytorch, where squared distances are summed over the 32 images of a GPU",
    StudentConfig("resnet18"),
    ObjectiveConfig("disco", head_norm=False, consistency_weight=32.0),
    None,
    SGD,
    recipe="moco-v2",
    batch_size=256,
    with_copy=True,
)

# facebookresearch/vissl, commit 04788de9: configs/config/debugging/pretrain/swav_distillation
ROB_DINO = Preset(
    "RoB (2301.09451), facebookresearch/vissl 04788de9: DINO S/16 to ViT-Ti",
    StudentConfig("vit_tiny_patch16_224", drop_path=0.1),
    ObjectiveConfig("dino", teacher_temp=0.07, head="fresh", head_norm=False, norm_last_layer=False),
    None,
    replace(ADAMW, warmup_epochs=9.9, warmup_lr=1e-5),
    recipe="rob-dino",
    pairing=PairingChoice("same", step_targets=2, num_local=8),
    epochs=300,
)
ROB_SWAV = Preset(
    "RoB (2301.09451), facebookresearch/vissl 04788de9: SwAV to ResNet-18",
    StudentConfig("resnet18"),
    ObjectiveConfig("swav", teacher_temp=0.03, sinkhorn="batch", head="fresh", head_norm=True, norm_last_layer=False),
    None,
    replace(LARS, lr=0.3, warmup_epochs=10.0, warmup_lr=0.6, decay_all=True),  # .3 for the 512 images of a machine
    recipe="rob-swav",
    pairing=PairingChoice("same", step_targets=1, num_local=4, step_globals=2),
    epochs=100,
    batch_size=4096,
)
ROB_MSN = Preset(
    "RoB (2301.09451), facebookresearch/vissl 04788de9: MSN to ViT-Ti",
    StudentConfig("vit_tiny_patch16_224", patch_drop=0.1),  # .15 for larger students
    ObjectiveConfig(
        "msn", teacher_temp=0.025, sinkhorn="none", mean_entropy=0.0, head="fresh", head_type="mlp", head_norm=False
    ),
    None,
    replace(ADAMW, lr=2.5e-4, warmup_epochs=15.0, warmup_lr=2e-4),
    recipe="rob-msn",
    pairing=PairingChoice("same", step_targets=2, num_local=10),
    epochs=150,
    clip_grad=1.0,
)
ROB_IBOT = Preset(
    "RoB (2301.09451), facebookresearch/vissl 04788de9: iBOT to ViT-Ti",
    StudentConfig("vit_tiny_patch16_224"),
    ObjectiveConfig("ibot", teacher_temp=0.07, head="fresh", head_norm=False, norm_last_layer=False),
    None,
    replace(ADAMW, weight_decay_end=0.48, warmup_epochs=10.0, warmup_lr=1e-5),
    recipe="rob-ibot",
    pairing=PairingChoice("same", step_targets=2, num_local=10),
    epochs=100,
)


SEED = Preset(
    "SEED (2101.04731), jacobswan1/SEED: tools/opts.py, whose head is as wide as the student's features",
    StudentConfig("resnet18"),
    ObjectiveConfig("seed", hidden_dim=512, head_norm=False),
    None,
    replace(SGD, warmup_epochs=5.0),
    recipe="moco-v2",
    batch_size=256,
)
SIMREG = Preset(
    "SimReg (2201.05131), UCDvision/simreg: run.sh, whose head is twice as wide as the student's features",
    StudentConfig("resnet18"),
    ObjectiveConfig("simreg", hidden_dim=1024, head_norm=True),
    None,
    replace(SGD, lr=0.05),
    recipe="weak",
    areas=RecipeOverrides(global_scale=(0.2, 1.0)),
    epochs=130,
    batch_size=256,
)
DINOV3_DISTILLED = Preset(
    "DINOv3's distillation (2508.10104), facebookresearch/dinov3: dinov3_vitl16_lvd1689m_distilled.yaml",
    StudentConfig("vit_small_patch16_224"),
    ObjectiveConfig("dino", sinkhorn="batch", koleo=0.1, head="fresh", head_norm=False, norm_last_layer=False),
    None,
    OptimiserConfig("adamw", lr=2e-4, min_lr=1e-6, weight_decay=0.04),
    recipe="dino",
    areas=RecipeOverrides(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)),
    pairing=PairingChoice(num_local=8, fresh=False),
    epochs=100,
    clip_grad=3.0,
    average=0.999,
)


def sslight(baseline: Preset, file: str, recipe: str, pairing: PairingChoice) -> Preset:
    """The baseline with SSLight's views and their weight."""
    source = f"SSLight (2210.02808), saic-fi/SSLight: {file}"
    return replace(baseline, source=source, recipe=recipe, areas=AS_THE_RECIPE, pairing=pairing)


PRESETS: dict[str, Preset] = {
    "dino": DINO,
    "dino-cnn": DINO_CNN,
    "dino-vit": DINO_VIT,
    "sslight-cnn": sslight(DINO_CNN, "dino_cnn_sslight.yaml", "sslight", SSLIGHT_SIX),
    "sslight-vit": sslight(DINO_VIT, "dino_vit_sslight.yaml", "sslight", SSLIGHT_TEN),
    "swav-cnn": SWAV_CNN,
    "sslight-swav-cnn": sslight(SWAV_CNN, "swav_cnn_sslight.yaml", "sslight-swav", SSLIGHT_SIX),
    "moco-cnn": MOCO_CNN,
    "sslight-moco-cnn": sslight(MOCO_CNN, "moco_cnn_sslight.yaml", "sslight", replace(SSLIGHT_SIX, **ONE_KEY)),
    "moco-v2": MOCO_V2,
    "msn-vit": MSN_VIT,
    "disco": DISCO,
    "seed": SEED,
    "simreg": SIMREG,
    "dinov3-distilled": DINOV3_DISTILLED,
    "rob-dino": ROB_DINO,
    "rob-dino-b16": replace(ROB_DINO, source=ROB_DINO.source.replace("S/16", "B/16"), recipe="rob-dino-b16"),
    "rob-swav": ROB_SWAV,
    "rob-swav-teacher-prototypes": replace(
        ROB_SWAV,
        source=ROB_SWAV.source + ", to the teacher's prototypes",
        objective=replace(ROB_SWAV.objective, head="frozen", head_type="mlp", norm_last_layer=None),
    ),
    "rob-msn": ROB_MSN,
    "rob-ibot": ROB_IBOT,
}
"""The student is one of the paper's own; any other may be given."""


def get_preset(name: str) -> Preset:
    """MisuseError, with the nearest names: unknown."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def preset(
    name: str, data: Path = Path("data.beton"), out: Path = Path("runs/preset"), targets: TargetsConfig | None = None
) -> TrainConfig:
    """A paper's settings for ``dataclasses.replace`` and ``train_student``, against other ``targets`` than its own where given.

    MisuseError: an unknown name, or a paper that has a teacher, without ``targets``.
    """
    found = get_preset(name)
    pairing = found.pairing
    if targets is not None and found.momentum is not None:
        pairing = replace(pairing, step_targets=None, fresh=None)  # the copy's
    if targets is None:
        if found.momentum is None:
            raise MisuseError(f"preset {name} needs `targets`: give Cached(path), or Online(teacher)")
        targets = replace(found.momentum, recipe=found.drawn())
    elif found.with_copy and not isinstance(targets, WithCopy):
        targets = WithCopy(targets)
    return TrainConfig(
        data=data,
        out=out,
        student=found.student,
        targets=targets,
        objective=found.objective,
        pairing=pairing,
        optimiser=found.optimiser,
        epochs=found.epochs,
        clip_grad=found.clip_grad,
        clip_each=found.clip_each,
        average=found.average,
        freeze_prototypes=found.freeze_prototypes,
        loader=LoaderConfig(batch_size=found.batch_size),
    )
