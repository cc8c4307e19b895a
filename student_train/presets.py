"""A paper's settings in one word: ``rob train-student --preset NAME``.

Each preset is a set of options of ``rob train-student``; an option that the user gives beats it. Learning rates are for a
batch of 256 and are scaled to the batch at hand, as the papers do. What a preset leaves out is the same in the paper as by
default: 10 epochs of warm-up in 100 and more (a tenth of fewer), momentum .9, temperatures, the lengths of queues.

What is not as in the papers' code:

- SwAV: the queue has 3840 rows, there as many whole batches as they hold, 3072; the rate rises from 0, there from .075
  (``START_WARMUP``). As there, the queue begins to fill in epoch 15, but for a frozen teacher's targets: those serve at once.
- MoCo: the keys' BatchNorm sees the batch as it is, there shuffled over the GPUs (ShuffleBN); both global crops are keys, there
  one of them. MoCo-v2 lowers its rate once an epoch, here every step, and decays biases and norms too.
- MSN: no patches are masked; a step has two target views, there one. The rate warms up in 10 epochs from 0, there in 15 from
  2e-4; it and the weight decay have run their cosines when the run ends, there four fifths of them (to 1e-4 and .37). Decay
  and the limit of the gradient hold for the prototypes too.
- DisCo: as MoCo-v2, and the keys are the teacher's, there a copy's.
- SSLight's CNNs: depthwise convolutions are decayed, there they are not; the last BatchNorm of a residual branch starts at 0,
  there at 1.
- ViTs: position embeddings and class token are not decayed, there they are.

With ``--targets CACHE.zarr`` a preset sets the same, but for what concerns the copy of the student; the global crops are
those that the targets were cached with. With another ``--objective`` it sets what that one reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import unknown_name

OF_THE_COPY = ("prototypes", "copy_momentum", "warmup_teacher_temp_epochs", "step_targets")
"""Options of a preset that are for ``--targets momentum`` alone."""

OF_ITS_OWN_VIEWS = ("recipe", "global_scale")
"""Those that a store of targets has settled already."""

OF_ITS_RECIPE = ("global_scale", "local_scale", "global_weight")
"""Those that say more of the preset's recipe, and nothing of another one."""


@dataclass(frozen=True)
class Preset:
    """``options``: of ``rob train-student``, by the names of its parameters; ``source`` is where the values stand."""

    source: str
    options: Mapping[str, Any]


COPY = {"targets": "momentum", "copy_momentum": 0.996, "freeze_prototypes": 1}
LARS = {"optimiser": "lars", "lr": 0.48, "min_lr": 0.0048, "weight_decay": 1e-6}
ADAMW = {"optimiser": "adamw", "lr": 5e-4, "min_lr": 1e-5, "weight_decay": 0.04, "weight_decay_end": 0.4}
SGD = {"optimiser": "sgd", "lr": 0.03, "min_lr": 0.0, "weight_decay": 1e-4, "warmup_epochs": 0.0}
LENGTH = {"epochs": 200, "batch_size": 1024, "clip_grad": 0.0}

DINO_CNN = {"student": "resnet18", "objective": "dino", "prototypes": 4096, "head_norm": True}
DINO_CNN = DINO_CNN | COPY | {"warmup_teacher_temp_epochs": 50} | LARS | LENGTH
DINO_VIT = {"student": "vit_tiny_patch16_224", "drop_path": 0.1, "objective": "dino"}
DINO_VIT = DINO_VIT | {"prototypes": 65536, "head_norm": False, "norm_last_layer": False}
DINO_VIT = DINO_VIT | COPY | {"warmup_teacher_temp_epochs": 30} | ADAMW | LENGTH
SWAV_CNN = {
    "student": "mobilenetv2_100",
    "objective": "swav",
    "prototypes": 3000,
    "hidden_dim": 4096,
    "head_norm": True,
}
SWAV_CNN = SWAV_CNN | {"targets": "momentum", "freeze_prototypes": 1} | LARS | {"lr": 0.3} | LENGTH
MOCO_CNN = {"student": "mobilenetv2_100", "objective": "moco", "head_norm": False}
MOCO_CNN = MOCO_CNN | {"targets": "momentum", "copy_momentum": 0.999} | LARS | LENGTH
MOCO_V2 = {"student": "resnet50", "objective": "moco", "head_norm": False}
MOCO_V2 = MOCO_V2 | {"targets": "momentum", "copy_momentum": 0.999} | SGD | LENGTH | {"batch_size": 256}
MSN_VIT = {"student": "deit_small_patch16_224", "objective": "msn", "prototypes": 1024, "head_norm": True}
MSN_VIT = MSN_VIT | COPY | {"freeze_prototypes": 0, "step_targets": 2} | ADAMW | {"lr": 2.5e-4, "min_lr": 1e-6}
MSN_VIT = MSN_VIT | LENGTH | {"epochs": 800, "clip_grad": 3.0}
DISCO = {"student": "resnet18", "objective": "disco", "head_norm": False, "consistency_weight": 32.0}
DISCO = DISCO | SGD | LENGTH | {"batch_size": 256}

CNN_VIEWS = {"recipe": "dino", "global_scale": (0.14, 1.0), "local_scale": (0.05, 0.14), "num_local": 6}
SSLIGHT_VIEWS = {"recipe": "sslight", "global_weight": 0.4}
SSLIGHT_SWAV_VIEWS = {"recipe": "sslight-swav", "global_weight": 0.4, "num_local": 6}

PRESETS: dict[str, Preset] = {
    "dino-cnn": Preset("SSLight's baseline, saic-fi/SSLight: dino_cnn_baseline.yaml", DINO_CNN | CNN_VIEWS),
    "dino-vit": Preset(
        "SSLight's baseline, saic-fi/SSLight: dino_vit_baseline.yaml", DINO_VIT | {"recipe": "dino", "num_local": 10}
    ),
    "sslight-cnn": Preset(
        "SSLight (2210.02808), saic-fi/SSLight: dino_cnn_sslight.yaml", DINO_CNN | SSLIGHT_VIEWS | {"num_local": 6}
    ),
    "sslight-vit": Preset(
        "SSLight (2210.02808), saic-fi/SSLight: dino_vit_sslight.yaml", DINO_VIT | SSLIGHT_VIEWS | {"num_local": 10}
    ),
    "swav-cnn": Preset(
        "SSLight's baseline, saic-fi/SSLight: swav_cnn_baseline.yaml", SWAV_CNN | {"recipe": "swav", "num_local": 6}
    ),
    "sslight-swav-cnn": Preset(
        "SSLight (2210.02808), saic-fi/SSLight: swav_cnn_sslight.yaml", SWAV_CNN | SSLIGHT_SWAV_VIEWS
    ),
    "moco-cnn": Preset("SSLight's baseline, saic-fi/SSLight: moco_cnn_baseline.yaml", MOCO_CNN | CNN_VIEWS),
    "sslight-moco-cnn": Preset(
        "SSLight (2210.02808), saic-fi/SSLight: moco_cnn_sslight.yaml", MOCO_CNN | SSLIGHT_VIEWS | {"num_local": 6}
    ),
    "moco-v2": Preset(
        "MoCo-v2 (2003.04297), facebookresearch/moco: README.md", MOCO_V2 | {"recipe": "moco-v2", "num_local": 0}
    ),
    "msn-vit": Preset(
        "MSN (2204.07141), facebookresearch/msn: msn_vits16.yaml, whose rate of .001 is for a batch of 1024",
        MSN_VIT | {"recipe": "msn", "num_local": 10},
    ),
    "disco": Preset(
        "DisCo (2104.09124), Yuting-Gao/DisCo-pytorch, where squared distances are summed over the 32 images of a GPU",
        DISCO | {"recipe": "moco-v2"},
    ),
}
"""The student is one of the paper's own; any other may be given."""


def get_preset(name: str) -> Preset:
    """MisuseError, with the nearest names: unknown."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
