"""Settings that cannot be are refused before anything is written."""

from dataclasses import replace

import pytest

from rob.common.errors import MisuseError
from rob.common.store.encodings import Encoding
from rob.common.views.recipes import get_recipe
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainResult, train_student
from support.tiny import tiny_store, tiny_teacher_checkpoint
from support.training import CPU, LOADER, NO_WARM_UP, online, refused


def test_settings_that_cannot_be_leave_no_folder(config, teacher, store):
    with pytest.raises(MisuseError, match=r"`targets` is a path: give Cached\(.*, or Online or Momentum"):
        replace(config, targets=store.path)
    refused(replace(config, loader=replace(LOADER, batch_size=25)), "`batch_size` 25 is more than the 24 images")
    refused(
        replace(config, pairing=PairingConfig("same", step_targets=3)), "holds 2 views .* uses 3: pass `step_targets` 2"
    )
    refused(replace(config, student=StudentConfig("resnet19")), "unknown student 'resnet19': did you mean resnet")
    vit = StudentConfig("test_vit", 30, small_images=True)
    refused(replace(config, student=vit), "cannot take images of 30 x 30 px")
    local = replace(config, student=replace(vit, image_size=32), local_size=14, pairing=PairingConfig(num_local=1))
    refused(local, "cannot take images of 14 x 14 px")
    refused(replace(config, optimiser=OptimiserConfig(warmup_epochs=4)), "`warmup_epochs` 4 leave nothing")
    refused(replace(config, accumulate=3), "`accumulate` 3 does not divide the 8 images that a step has on a rank")
    patches = StudentConfig("resnet18", 32, small_images=True, patch_drop=0.1)
    refused(replace(config, student=patches), r"`patch_drop` 0\.1: resnet18 has no patches to drop")
    refused(replace(config, precision="fp8"), "unknown precision 'fp8': did you mean fp")
    refused(replace(config, precision="fp16"), "fp16 needs a GPU")
    refused(replace(config, device="gpu"), "unknown device 'gpu'")
    live = online(teacher, store, get_recipe("moco-v2"))
    local = replace(config, pairing=PairingConfig(num_local=2), targets=live)
    refused(local, "recipe moco-v2 .* has no local crops")
    with pytest.raises(MisuseError, match="`accumulate` is 0, expected at least 1"):
        replace(config, accumulate=0)
    with pytest.raises(MisuseError, match="`clip_each` needs a limit, and `clip_grad` is 0"):
        replace(config, clip_each=True, clip_grad=0.0)
    with pytest.raises(MisuseError, match="`epochs` is 0"):
        replace(config, epochs=0)
    with pytest.raises(MisuseError, match="unknown optimiser 'adam': did you mean adamw"):
        replace(NO_WARM_UP, name="adam")


@pytest.mark.parametrize("pairing", [PairingConfig("same", num_local=2), PairingConfig("cross"), PairingConfig("all")])
def test_other_views_than_discos_are_refused_in_python_too(config, pairing):
    disco = replace(config.objective, name="disco")
    refused(replace(config, objective=disco, pairing=pairing), "`objective` disco compares the same views")


def test_logits_do_not_serve_the_embedding_objective(config, data, teacher, tmp_path):
    logits = tiny_store(tmp_path / "topk.zarr", data, teacher, encoding=Encoding("topk", k=4), loader=LOADER)
    refused(replace(config, targets=Cached(logits.path)), "the store holds logits: cache with `encoding` embedding")
    dino = replace(config, targets=Cached(logits.path), objective=replace(config.objective, name="dino"), epochs=1)
    assert isinstance(train_student(replace(dino, pairing=PairingConfig())), TrainResult)


def test_a_teacher_without_a_head_does_not_serve_dino(config, data, tmp_path):
    plain = tiny_store(tmp_path / "plain.zarr", data, tiny_teacher_checkpoint(tmp_path), loader=LOADER)
    dino = replace(config.objective, name="dino")
    refused(replace(config, targets=Cached(plain.path), objective=dino), "fit prototypes .* --prototypes K")
    fitted = tiny_store(tmp_path / "fitted.zarr", data, tiny_teacher_checkpoint(tmp_path), prototypes=8, loader=LOADER)
    centred = replace(dino, centre_targets="calibration")
    train_student(replace(config, targets=Cached(fitted.path), objective=centred, pairing=PairingConfig(), epochs=1))
    assert Cached(fitted.path).open(RunContext(data, CPU)).space.teacher_temp is not None


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_an_average_that_is_none(config, decay):
    with pytest.raises(MisuseError, match=f"`average` is {decay:g}, expected a value between 0 and 1"):
        replace(config, average=decay)
