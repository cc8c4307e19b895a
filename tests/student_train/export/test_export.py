"""rob export: files that compute what torch does, in their own runtimes, and nothing kept that does not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from rob.common.errors import FailureError, MisuseError
from rob.student_train.checkpoint import export_weights, load_student
from rob.student_train.export import export as module
from rob.student_train.export import formats
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.export.exported_file import read_exports
from rob.student_train.export.graph import Graph
from rob.student_train.export.input_form import WithInput
from rob.student_train.export.int8 import share_of_int8
from rob.student_train.export.onnx_file import write_onnx
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.tiny import contents, tiny_beton
from support.training import LOADER

RESNET, SMALL_RESNET = StudentConfig("test_resnet", 32, small_images=False), StudentConfig("test_resnet", 32)
SMALL_MOBILE, VIT = StudentConfig("mobilenetv3_small_050", 32), StudentConfig("test_vit", 32)
KINDS = [RESNET, SMALL_MOBILE, VIT]
NAMES = ["resnet", "small mobilenet", "vit"]


WRITTEN: dict[str, bytes] = {}
"""What was written of a graph, by its facts: the tests of int8 and of refusals need not write it again, at 5 seconds a time."""


@pytest.fixture(autouse=True)
def each_graph_once(monkeypatch):
    def write_once(graph: Graph, path: Path) -> None:
        key = json.dumps(graph.facts, sort_keys=True, default=str)
        if key not in WRITTEN:
            write_onnx(graph, path)
            WRITTEN[key] = path.read_bytes()
        path.write_bytes(WRITTEN[key])

    monkeypatch.setitem(formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], write=write_once))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_beton(tmp_path_factory.mktemp("data"), 24)


def a_run(folder: Path, student: StudentConfig) -> Path:
    """Weights of a network that tells pictures apart, as a run leaves them."""
    torch.manual_seed(0)
    backbone = build_student(student).train()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)  # residual branches begin as zero
        for _ in range(20):  # BatchNorm's statistics, of something
            backbone(torch.randn(16, 3, 32, 32))
    export_weights(backbone, describe_student(student), folder / "student.safetensors")
    return folder


def pictures(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def torchs(run: Path, pixels: np.ndarray) -> torch.Tensor:
    """The features of uint8 pixels, without any of the export's code."""
    backbone, info = load_student(run)
    mean, std = torch.tensor(info.mean).view(3, 1, 1), torch.tensor(info.std).view(3, 1, 1)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return backbone((images - mean) / std)


def close(found, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("student", KINDS, ids=NAMES)
def test_onnx_computes_what_torch_does_for_any_number_of_images(tmp_path, student):
    run = a_run(tmp_path / "run", student)
    (entry,) = export(ExportConfig(run))
    assert (entry.file, entry.precision, entry.input["shape"]) == ("student.onnx", "float32", ["batch", 32, 32, 3])
    session = onnxruntime.InferenceSession(run / "student.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == entry.input["shape"]
    assert entry.input["crop"] == 1.0  # networks up to 64 px see the whole square
    for n in (1, 5):
        close(session.run(None, {"image": pictures(n)})[0], torchs(run, pictures(n)))
    assert entry.agreement is not None
    assert entry.agreement.lowest_cosine > 0.9999
    assert entry.bytes == (run / "student.onnx").stat().st_size
    assert read_exports(run) == {"student.onnx": entry}


def test_the_input_may_be_floats_normalised_or_not(tmp_path):
    """Which is of the graph, not of the format: torch's is written soonest."""
    run = a_run(tmp_path / "run", RESNET)
    _, info = load_student(run)
    pixels = pictures(3)
    unit = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    normalised = (unit - np.float32(info.mean).reshape(3, 1, 1)) / np.float32(info.std).reshape(3, 1, 1)
    for form, images in (("unit", unit), ("normalised", normalised)):
        export(ExportConfig(run, ("torch",), input_form=form, out=tmp_path / form))
        loaded = torch.export.load(tmp_path / form / "student.pt2").module()
        close(loaded(torch.from_numpy(images)).detach(), torchs(run, pixels))


def test_torchs_own_file_needs_neither_rob_nor_timm(tmp_path):
    run = a_run(tmp_path / "run", SMALL_RESNET)
    export(ExportConfig(run, ("torch",)))
    loaded = torch.export.load(run / "student.pt2").module()
    for n in (1, 4):
        close(loaded(torch.from_numpy(pictures(n))).detach(), torchs(run, pictures(n)))


def test_a_vit_at_another_size_is_resampled_once(tmp_path):
    run = a_run(tmp_path / "run", VIT)
    (entry,) = export(ExportConfig(run, ("torch",), size=48))
    program = torch.export.load(run / "student.pt2")
    close(program.module()(torch.from_numpy(pictures(2, 48))).detach(), torchs(run, pictures(2, 48)))
    assert entry.input["shape"][1] == 48
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("student", [RESNET, VIT], ids=["resnet", "vit"])
def test_int8_is_int8_and_says_what_it_cost(tmp_path, data, student):
    run = a_run(tmp_path / "run", student)
    full, quantised = export(
        ExportConfig(run, data=data.path, int8=True, min_agreement=0.0, images=16, calibration=8, loader=LOADER)
    )
    assert (full.file, quantised.file) == ("student.onnx", "student.int8.onnx")
    model = onnx.load(run / quantised.file)
    assert share_of_int8(model) == quantised.int8_share > 0.9
    assert share_of_int8(onnx.load(run / full.file)) == 0.0
    assert quantised.agreement is not None
    assert quantised.agreement.images == 16
    assert quantised.agreement.mean_cosine > 0.9
    assert quantised.agreement.knn_torch == full.agreement.knn_torch is not None
    assert quantised.calibration_images == 8
    assert quantised.checked_on == data.manifest.fingerprint
    scales = [c for c in model.graph.initializer if c.name.endswith("_scale") and len(c.dims) == 1 and c.dims[0] > 1]
    assert scales, "no weight has a scale for each channel"


def test_a_file_that_disagrees_is_not_kept(tmp_path, monkeypatch, data):
    run = a_run(tmp_path / "run", RESNET)
    before = contents(run)
    onnx_format = formats.FORMATS["onnx"]
    wrong = formats.Format(
        onnx_format.suffix, onnx_format.runtime, (), "", onnx_format.write,
        lambda path: (lambda images: np.roll(onnx_format.load(path)(images), 1, axis=1)),
    )  # fmt: skip
    monkeypatch.setitem(formats.FORMATS, "onnx", wrong)
    with pytest.raises(FailureError, match=r"student.onnx is not kept: on 64 images the smallest cosine .* 0.9999 is"):
        export(ExportConfig(run))
    assert contents(run) == before


@pytest.mark.slow
def test_weights_left_in_float_are_no_int8(tmp_path, monkeypatch, data):
    run = a_run(tmp_path / "run", RESNET)
    monkeypatch.setattr(module, "MIN_SHARE", 1.01)
    with pytest.raises(FailureError, match="only 100% of the weights became int8"):
        export(ExportConfig(run, data=data.path, int8=True, images=8, calibration=8, loader=LOADER))
    assert set(read_exports(run)) == {"student.onnx"}
    assert sorted(contents(run)) == ["export.json", "student.onnx", "student.safetensors"]


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(images).flatten(1)

    graph = Graph(WithInput(Odd(), "unit", 8, (0.5,) * 3, (0.5,) * 3).eval(), describe_student(RESNET), 20, {})
    with pytest.raises(FailureError, match=r"test_resnet does not become ONNX of `opset` 20: .*svd"):
        write_onnx(graph, tmp_path / "odd.onnx")
    assert contents(tmp_path) == {}


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    run = a_run(tmp_path / "run", RESNET)
    (run / module.STAGING).mkdir()
    (run / module.STAGING / "student.onnx").write_bytes(b"half")
    export(ExportConfig(run, ("torch",)))
    assert sorted(contents(run)) == ["export.json", "student.pt2", "student.safetensors"]


@pytest.mark.parametrize("student", [RESNET, VIT], ids=["resnet", "vit"])
def test_timm_alone_loads_its_folder_with_the_normalisation(tmp_path, student):
    run = a_run(tmp_path / "run", student)
    export(ExportConfig(run, ("timm",)))
    model = timm.create_model(f"local-dir:{run / 'timm'}", pretrained=True).eval()
    _, info = load_student(run)
    config = resolve_model_data_config(model)
    assert (tuple(config["mean"]), tuple(config["std"]), tuple(config["input_size"])) == (
        info.mean,
        info.std,
        (3, 32, 32),
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(model(images), load_student(run)[0](images))
    told = json.loads((run / "timm" / "config.json").read_text())
    assert told["architecture"] == student.name
    assert not {"tag", "license"} & told["pretrained_cfg"].keys()  # of timm's own weights of that name


@pytest.mark.parametrize("student", [SMALL_RESNET, SMALL_MOBILE], ids=["resnet", "mobilenet"])
def test_what_timm_cannot_express_comes_with_the_lines_that_work(tmp_path, student):
    run = a_run(tmp_path / "run", student)
    before = contents(run)
    with pytest.raises(MisuseError, match="timm cannot express") as refused:
        export(ExportConfig(run, ("timm",)))
    assert contents(run) == before
    lines = str(refused.value).partition("These two lines load it: ")[2].replace("; ", "\n")
    loaded: dict = {}
    exec(lines, loaded)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(loaded["backbone"](images), load_student(run)[0](images))


def test_a_weights_file_is_exported_beside_itself(tmp_path):
    run = a_run(tmp_path / "run", RESNET)
    (run / "student.safetensors").rename(run / "student_average.safetensors")
    (entry,) = export(ExportConfig(run / "student_average.safetensors", ("torch",)))
    assert entry.file == "student_average.pt2"
    assert (run / entry.file).exists()


@pytest.mark.parametrize("name", ["executorch", "coreml"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, name):
    run = a_run(tmp_path / "run", RESNET)
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    with pytest.raises(MisuseError, match=rf"needs {name}.*not installed here: .*pip install .*\[{name}\]"):
        export(ExportConfig(run, (name,)))


@pytest.mark.slow
def test_executorch_computes_what_torch_does(tmp_path):
    pytest.importorskip("executorch")
    run = a_run(tmp_path / "run", RESNET)
    (entry,) = export(ExportConfig(run, ("executorch",)))
    assert entry.agreement is not None
    assert entry.agreement.lowest_cosine > 0.9999
    assert entry.input["shape"] == [1, 32, 32, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("executorch", "executorch"), ("litert", "litert_torch")])
def test_files_for_phones_are_of_8_bits(tmp_path, data, name, package):
    pytest.importorskip(package)
    run = a_run(tmp_path / "run", RESNET)
    full, eight_bits = export(ExportConfig(run, (name,), data=data.path, int8=True, min_agreement=0.5, loader=LOADER))
    assert full.agreement is not None
    assert full.agreement.lowest_cosine > 0.9999
    assert eight_bits.agreement is not None
    assert eight_bits.agreement.mean_cosine > 0.9
    assert eight_bits.bytes < full.bytes
    assert eight_bits.int8_share is not None
    assert eight_bits.int8_share > 0.999  # mean and standard deviation of the pixels stay floats


@pytest.mark.slow
def test_core_mls_weights_are_of_8_bits(tmp_path, data):
    """Whether it computes what torch does, only a Mac can tell."""
    coremltools = pytest.importorskip("coremltools")
    run, notes = a_run(tmp_path / "run", RESNET), []
    half, eight_bits = export(ExportConfig(run, ("coreml",), data=data.path, int8=True, loader=LOADER), notes.append)
    assert (half.precision, eight_bits.precision) == ("float16", "int8")
    assert (half.agreement, eight_bits.agreement, eight_bits.latency_ms) == (None, None, None)
    assert eight_bits.int8_share is not None
    assert eight_bits.int8_share > 0.9
    assert eight_bits.bytes < 0.7 * half.bytes
    assert any("converted, not checked" in note and "the weights alone have 8 bits" in note for note in notes)
    spec = coremltools.models.MLModel(str(run / eight_bits.file), skip_model_load=True).get_spec()
    assert [entry.name for entry in spec.description.input] == ["image"]
    assert [entry.name for entry in spec.description.output] == ["features"]
