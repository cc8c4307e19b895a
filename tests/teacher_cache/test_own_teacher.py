"""A teacher of the user's own code: it says how its images are normalised, or the user does; its code is part of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rob.common import factories
from rob.common.errors import MisuseError
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.teacher import cast_once
from rob.teacher_cache.cache import cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from rob.teacher_cache.verify import VerifyConfig, verify
from support.tiny import tiny_beton, tiny_cache_config

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))


def frozen() -> nn.Module:
    """As published ones come: without gradients, and they say what they take."""
    made = network().requires_grad_(False)
    made.mean, made.std, made.image_size = MEAN, torch.tensor(STD), 32
    return made


def of_timm() -> nn.Module:
    made = network()
    made.default_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 32, 32)}
    return made


def changed() -> nn.Module:
    made = frozen()
    made[0].weight.add_(0.1)
    return made


def broken() -> nn.Module:
    return nn.Conv2d(4, 3, 3)


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(factories, "_named", {})


def own(factory, **settings) -> TeacherConfig:
    return TeacherConfig(factory, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", [frozen, of_timm, network])
def test_its_features_are_normalised_and_it_says_what_it_takes(factory):
    told = {"mean": MEAN, "std": STD, "size": 32} if factory is network else {}
    teacher = load_teacher(own(factory, **told))
    assert teacher.name == f"{__name__}:{factory.__name__}"
    assert (teacher.mean, teacher.std) == (pytest.approx(MEAN), pytest.approx(STD))
    assert (teacher.view_size, teacher.dim) == (32, 12)
    images = torch.randn(2, 3, 32, 32)
    wanted = nn.functional.normalize(network().eval()(images).mean((2, 3)), dim=1)
    torch.testing.assert_close(teacher(images), wanted.detach())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_it_is_told_apart_by_its_weights_and_by_its_code(tmp_path):
    hashes = [load_teacher(own(factory)).weights_hash for factory in (frozen, of_timm, changed)]
    assert len(set(hashes)) == 3
    assert load_teacher(own(frozen)).weights_hash == hashes[0]
    save_file({name: t.contiguous() for name, t in changed().state_dict().items()}, tmp_path / "changed.safetensors")
    filled = load_teacher(own(frozen, checkpoint=tmp_path / "changed.safetensors"))
    assert torch.equal(filled.backbone.model[0].weight, changed()[0].weight)
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MisuseError, match=r"other.safetensors is not of .*:frozen: Missing key.*0.weight"):
        load_teacher(own(frozen, checkpoint=tmp_path / "other.safetensors"))


class LeavesAutocast(nn.Module):
    """As published networks do where half precision is too coarse."""

    mean, std, image_size = MEAN, STD, 32

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.project(images.float().mean((2, 3)))


def test_its_own_precision_stays():
    """Weights that are cast for CUDA, as those of timm's networks, would meet float32 there."""
    teacher = load_teacher(own(LeavesAutocast))
    on_cuda = cast_once(teacher, torch.device("cuda"), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(on_cuda(images := torch.randn(2, 3, 32, 32)), teacher(images))


class Moments(nn.Module):
    mean, std, image_size = MEAN, STD, 32

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


@pytest.mark.parametrize("patches", ["auto", "none"])
def test_one_without_weights(tmp_path, patches):
    data, out = tiny_beton(tmp_path, 8), tmp_path / "targets.zarr"
    cache_teacher(tiny_cache_config(out, data, own(Moments), patches=PatchChoice(patches)))
    assert TargetStore.open(out).manifest.dim == 6


def test_its_store_is_verified_with_it_alone(tmp_path):
    data = tiny_beton(tmp_path, 16)
    config = tiny_cache_config(
        tmp_path / "t.zarr", data, own(frozen), patches=PatchChoice("grid", patch_grid=4, patch_dim=0)
    )
    cache_teacher(config)
    store = TargetStore.open(config.out)
    assert (store.manifest.teacher, store.manifest.dim, store.patches.dim) == (f"{__name__}:frozen", 12, 12)
    check = VerifyConfig(config.out, data.path, own(frozen), samples=4, device="cpu")
    assert verify(check).lowest_cosine > 0.999
    with pytest.raises(MisuseError, match=r"was cached from teacher .*:frozen with weights"):
        verify(replace(check, teacher=own(changed)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: own(network), r"`teacher` .*:network does not say its mean.*pass `teacher_mean` 0.485,0.456,0.406"),
        (lambda: own(network, mean=MEAN), r"does not say its std.*attribute .std"),
        (lambda: own(network, mean=MEAN, std=STD), "does not say its image_size.*pass `teacher_size` 224"),
        (lambda: own(frozen, teacher_features="cls"), "`teacher_features` is for timm's networks"),
        (lambda: own(frozen, backbone_args={"img_size": 32}), "`backbone_args` is for timm's networks"),
        (lambda: own(broken, mean=MEAN, std=STD, size=32), r"teacher .*:broken makes no features of images"),
        (lambda: TeacherConfig("resnet18", mean=MEAN), "`teacher_mean` is for a teacher of your own"),
        (lambda: TeacherConfig("no_such_module_here:build"), "`teacher` .*there is no module no_such_module_here"),
    ],
)
def test_what_cannot_be_a_teacher_is_a_sentence(config, message):
    with pytest.raises(MisuseError, match=message):
        load_teacher(config())
