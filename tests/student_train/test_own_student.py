"""Students that are not timm's: a detector and a segmenter trained in place, the user's own function, and what takes a run."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model

from rob.common import factories
from rob.common.errors import MisuseError
from rob.common.exported import StudentInfo
from rob.student_train.as_teacher import ExportTeacherConfig, export_teacher
from rob.student_train.checkpoint import export_weights, load_student
from rob.student_train.evaluate.detection.model import build_detector
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.students import StudentConfig, build_student, describe_student
from rob.student_train.train import TrainProgress, train_student
from support.training import CPU, STEPS_PER_EPOCH, curve


def tiny() -> nn.Module:
    """A classifier of ours, whose features go into its last layer."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 3))  # fmt: skip


TINY = StudentConfig(tiny, 32, features="5:in")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layer", "still"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", "backbone.body", ("backbone.fpn.", "rpn.", "roi_heads.")),
        ("lraspp_mobilenet_v3_large", "backbone", ("classifier.",)),
    ],
)
def test_the_backbone_inside_a_network_is_trained_and_the_whole_is_written_back(config, name, layer, still):
    """torchvision loads it strictly, and what is said to have moved has."""
    student = StudentConfig(f"torchvision/{name}", 32, features=layer)
    notes: list[str] = []
    train_student(replace(config, student=student, epochs=1), TrainProgress(note=notes.append))
    written = load_file(config.out / "student.safetensors")
    whole = get_model(name, weights=None, weights_backbone=None)
    whole.load_state_dict(written, strict=True)
    torch.manual_seed(config.seed)
    before = build_student(student)
    moved = {key for key, tensor in before.model.state_dict().items() if not torch.equal(tensor, written[key])}
    assert moved == before.moved
    assert {key for key in written if key.startswith(still)} == written.keys() - moved
    said = next(note for note in notes if note.startswith(f"{config.out}"))
    assert f"trained: {len(moved)} of {len(written)} tensors ({layer})" in said
    assert f"as they were: {len(written) - len(moved)} ({', '.join(part[:-1] for part in still)})" in said


def test_a_classifier_of_torchvision_gives_what_its_last_layer_is_given():
    backbone = build_student(StudentConfig("torchvision/mobilenet_v3_small", 32)).eval()
    assert (backbone.layer, backbone.num_features) == ("classifier.3:in", 1024)
    with pytest.raises(MisuseError, match="`student_features`, such as backbone; it has backbone, classifier"):
        build_student(StudentConfig("torchvision/lraspp_mobilenet_v3_large", 32))
    with pytest.raises(MisuseError, match="unknown torchvision model 'resnet81': did you mean"):
        build_student(StudentConfig("torchvision/resnet81", 32))


def test_a_run_of_the_users_own_function_goes_on_and_is_loaded_by_those_who_name_it(config, monkeypatch):
    config = replace(config, student=TINY, epochs=2)
    train_student(config)
    whole = curve(config.out)
    again = replace(config, out=config.out.with_name("again"))
    killed = replace(again, checkpoint_every=1)

    def kill(line, total):
        if line["step"] == STEPS_PER_EPOCH + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(killed, TrainProgress(log=kill))
    train_student(again)
    assert curve(again.out) == whole
    network = tiny()
    network.load_state_dict(load_file(config.out / "student.safetensors"), strict=True)
    backbone, info = load_student(config.out)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), network.eval()[:5](images))
    assert (info.name, info.features) == (f"{__name__}:tiny", "5:in")
    monkeypatch.setattr(factories, "_named", {})  # as in another process
    with pytest.raises(MisuseError, match=r"student.safetensors: its network is .*:tiny, of somebody's own code"):
        load_student(config.out)
    load_student(config.out, student=tiny)
    with pytest.raises(
        MisuseError, match=r"its student is .*:tiny, and a teacher's file is timm's: rob cache-teacher takes"
    ):
        export_teacher(ExportTeacherConfig(config.out, config.out / "teacher.safetensors"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student's weights, with nothing around them."""
    folder = tmp_path_factory.mktemp("own")
    export_weights(build_student(TINY).eval(), describe_student(TINY), folder / "student.safetensors")
    return folder


def test_what_takes_weights_takes_these_or_says_what_to_do(run):
    network = FrozenNetwork.student(run, CPU)
    assert network.embed(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    assert FrozenNetwork.untrained(describe_student(TINY), 0, CPU).name == f"random {__name__}:tiny"
    backbone, info = load_student(run)
    with pytest.raises(
        MisuseError, match=r"tiny does not show its stages.*load its student.safetensors into the detector"
    ):
        build_detector(backbone, info, 2, masks=False, side=32)
    with pytest.raises(MisuseError, match=r"`to` timm: .*tiny is not timm's.*student=\".*:tiny\""):
        export(ExportConfig(run, to=("timm",)))


def test_settings_that_mean_nothing_to_it_are_refused():
    for changes, message in (
        ({"small_images": True}, "no small-image form"),
        ({"drop_path": 0.1}, "has no stochastic depth"),
        ({"patch_drop": 0.1}, "has no patches to drop"),
    ):
        with pytest.raises(MisuseError, match=message):
            build_student(replace(TINY, **changes))
    with pytest.raises(MisuseError, match="`student_features` layer4 is for networks that are not timm's"):
        build_student(StudentConfig("resnet18", 32, features="layer4"))


@pytest.mark.parametrize("told", [{"features": 3}, {"timm_kwargs": {"num_classes": 0}}, {"small_images": True}])
def test_a_made_up_description_of_one_is_none(told):
    values = describe_student(TINY).to_dict()
    assert StudentInfo.from_dict(values) == describe_student(TINY)
    with pytest.raises(ValueError):
        StudentInfo.from_dict({**values, **told})


def test_a_segmenter_of_another_library_is_trained_in_place():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")

    def unet() -> nn.Module:
        return smp.Unet("resnet18", encoder_weights=None, classes=2)

    student = build_student(StudentConfig(unet, 64, features="encoder"))  # type: ignore[arg-type]
    assert student.entry == "encoder"
    assert student.moved == {name for name in student.model.state_dict() if name.startswith("encoder.")}
