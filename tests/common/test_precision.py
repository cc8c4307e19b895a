"""The precision that a device gets by itself, and what follows from it."""

import pytest
import timm
import torch

from rob.common.errors import MisuseError
from rob.common.run import allow_fast_arithmetic, autocast, choose_precision, tuning
from rob.common.teacher import cast_once, half_products
from rob.teacher_cache.teachers import Teacher

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_is_bf16_where_a_gpu_is_fast_at_it(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(CUDA, "auto") == chosen
    assert choose_precision(CUDA, "fp16") == "fp16"
    assert choose_precision(CPU, "auto") == "fp32"


def test_an_unknown_one_is_refused_and_auto_is_listed():
    with pytest.raises(MisuseError, match="auto"):
        autocast(CPU, "bf61")
    with autocast(CPU, "auto"):
        assert not torch.is_autocast_enabled("cpu")


def test_fast_arithmetic_is_for_gpus_that_were_not_asked_for_fp32():
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    limit = torch.backends.cudnn.benchmark_limit
    try:
        allow_fast_arithmetic(CPU, "auto")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == kept
        allow_fast_arithmetic(CUDA, "auto")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
        for allowed in (False, True):
            with tuning(allowed):
                assert torch.backends.cudnn.benchmark == allowed
        assert torch.backends.cudnn.benchmark
        allow_fast_arithmetic(CUDA, "fp32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = kept[1], limit


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_weights_cast_once_give_what_autocast_gives(name):
    network = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode(), autocast(CPU, "bf16"):
        expected = network(images)
        half_products(network, torch.bfloat16)
        assert torch.equal(network(images), expected)
    dtypes = {parameter.dtype for parameter in network.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}  # norms and embeddings stay


def test_the_teacher_itself_is_not_touched():
    teacher = Teacher("t", timm.create_model("test_vit", num_classes=0))
    copy = cast_once(teacher, CUDA, "bf16")
    assert copy is not teacher
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in copy.parameters()}  # type: ignore[attr-defined]
    assert copy.weights_hash == teacher.weights_hash
    assert cast_once(teacher, CUDA, "fp32") is teacher
    assert cast_once(teacher, CPU, "bf16") is teacher
