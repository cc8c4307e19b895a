"""Networks of the user's own: named by the user alone, run by one of their layers, refused without features."""

import sys

import pytest
import torch
from torch import nn

from rob.common import factories
from rob.common.errors import MisuseError
from rob.common.factories import build_named, is_factory, name_factory
from rob.common.own_network import OwnNetwork, parts_of


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(factories, "_named", {})


class Body(nn.Module):
    """Two maps, the second half as wide; the image comes out as well, as of some encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images):
        early = self.stem(images)
        return {"image": images, "early": early, "late": self.last(early)}


class Detector(nn.Module):
    """Wants boxes in training, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Identity()
        self.backbone = Body()
        self.head = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, images, targets=None):
        assert not self.training or targets is not None, "targets should not be none when in training mode"
        return [{"boxes": self.head(self.backbone(images)["late"])}]


def own(model: nn.Module, layer: str | None = None) -> OwnNetwork:
    return OwnNetwork(model, layer, 16, "student mine", "student_features")


@pytest.mark.parametrize(
    ("layer", "entry", "width"),
    [
        ("backbone", "backbone", 10),  # both maps, side by side, and not the image
        ("backbone.last", "backbone", 6),
        ("backbone.last:in", "backbone", 4),
        ("backbone.stem", "backbone.stem", 4),  # which takes images itself: the rest would be computed for nothing
        ("backbone.stem.1", "backbone.stem", 4),
    ],
)
def test_a_layer_is_pooled_by_the_smallest_part_that_takes_images(layer, entry, width):
    model = Detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = own(model, layer)
    assert (student.entry, student.num_features) == (entry, width)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        maps = model.backbone(images)
        wanted = {"backbone.last": maps["late"], "backbone.last:in": maps["early"], "backbone.stem": maps["early"]}
        if layer in wanted:
            torch.testing.assert_close(student(images), wanted[layer].mean((2, 3)))
    model.load_state_dict(before)
    assert all(module.training for module in model.modules())  # finding out has left no trace
    assert all(torch.equal(tensor, before[name]) for name, tensor in own(model, layer).model.state_dict().items())


def test_what_has_no_part_in_the_layer_is_not_trained():
    student = own(Detector(), "backbone.stem").train()
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    assert {name for name, p in student.model.named_parameters() if not p.requires_grad}.isdisjoint(student.moved)
    assert not any(p.requires_grad for p in student.model.head.parameters())
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], weight_decay=1.0)
    student(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    changed = {name for name, tensor in student.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == student.moved == {name for name in before if name.startswith("backbone.stem.")}


def test_a_whole_network_may_give_features_a_map_or_tokens():
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5))
    assert own(vectors).num_features == 5
    assert own(nn.Conv2d(3, 7, 3)).num_features == 7
    tokens = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(4, 9))
    assert own(tokens).num_features == 9


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, images):
        return self.conv(images)


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (Detector(), "backbone.lost", r"unknown layer of student mine 'backbone.lost': did you mean .*backbone.last"),
        (
            Detector(),
            None,
            r"makes no features .*targets should not be none.*`student_features`; it has transform, backbone",
        ),
        (Body(), None, r"returns a dict, expected features \(B, F\): name a layer"),
        (Frozen(), None, "has no gradient at its features"),
        (nn.Flatten(0), None, "has no weights"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(0)), None, r"gives \(1024,\) for 2 images"),
        (nn.Conv2d(4, 2, 1), None, "makes no features of images .*expected input"),
        (nn.Sequential(nn.Conv2d(3, 4, 99)), "0", r"0 cannot be had .*Kernel size.*run on images of 16 px"),
    ],
)
def test_what_makes_no_features_is_a_sentence(model, layer, message):
    with pytest.raises(MisuseError, match=message):
        own(model, layer)


def test_names_of_tensors_in_few_words():
    still = ["head.0.weight", "head.0.bias", "rpn.bias"]
    assert parts_of(["backbone.a.weight", "backbone.b.weight"], still) == "backbone"
    assert parts_of(still, ["backbone.a.weight", "head.1.weight"]) == "head.0, rpn"


# ==== factories ====

MODULE = """
from torch import nn
import torch
def build(): return nn.Conv2d(3, 4, 3)
def wants(width): return nn.Conv2d(3, width, 3)
def breaks(): raise KeyError("width")
def nothing(): return 3
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, which the console script does not have on its path."""
    (tmp_path / "mynets_of_a_test.py").write_text(MODULE)
    (tmp_path / "broken_of_a_test.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("mynets_of_a_test", None)


def test_a_factory_is_imported_where_the_user_names_it_and_nowhere_else(module):
    name = "mynets_of_a_test:build"
    with pytest.raises(
        MisuseError, match=r"not imported because a file names it: pass `student` mynets_of_a_test:build"
    ):
        build_named(name)
    assert "mynets_of_a_test" not in sys.modules
    assert name_factory(name) == name
    assert isinstance(build_named(name), nn.Conv2d)
    assert isinstance(build_named("moved.elsewhere:build"), nn.Conv2d)  # the only one that was named


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:build", r"there is no module no_such_module_here \(install"),
        ("mynets_of_a_test.py:build", r"there is no module .*write mynets_of_a_test:build"),
        ("broken_of_a_test:build", "importing broken_of_a_test failed: ModuleNotFoundError: .*nowhere_to_be_found"),
        ("mynets_of_a_test:biuld", "unknown factory of mynets_of_a_test 'biuld': did you mean build"),
        ("mynets_of_a_test:number", "is a int, expected a function"),
        ("mynets_of_a_test:wants", r"wants arguments \(\(width\)\)"),
        ("mynets_of_a_test:breaks", "failed to build a network: KeyError: 'width'"),
        ("mynets_of_a_test:nothing", r"returned a int, expected a torch.nn.Module"),
    ],
)
def test_a_bad_factory_is_a_sentence(module, name, message):
    assert is_factory(name)
    with pytest.raises(MisuseError, match=message):
        build_named(name_factory(name))


def test_functions_and_networks_are_taken_as_they_are():
    network = nn.Conv2d(3, 4, 3)
    name = name_factory(network)
    copy = build_named(name)
    assert is_factory(name)
    assert copy is not network and torch.equal(copy.weight, network.weight)
    with pytest.raises(MisuseError, match="another Conv2d of this structure and other weights was given before"):
        name_factory(nn.Conv2d(3, 4, 3))
    with pytest.raises(MisuseError, match="has no name by which files know it"):
        name_factory(lambda: network)

    def of(width):
        def build():
            return nn.Conv2d(3, width, 3)

        return build

    assert build_named(name_factory(of(5))).out_channels == 5
    with pytest.raises(MisuseError, match="builds from other values"):
        name_factory(of(6))


def test_names_of_timm_are_no_factories():
    for name in (
        "resnet18",
        "vit_small_patch16_224.dino",
        "hf-hub:user/model",
        "local-dir:/tmp/x",
        "torchvision/resnet18",
    ):
        assert not is_factory(name)
