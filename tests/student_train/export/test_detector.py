"""rob export of a detector: an ONNX file that finds in any picture what torch finds, and nothing kept that does not."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.pack import PackConfig, pack
from rob.student_train.evaluate.detection.model import build_detector
from rob.student_train.evaluate.results import read_results
from rob.student_train.export import detector as module
from rob.student_train.export.boxes import Boxes, agreement_of_boxes
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.export.exported_file import read_exports
from rob.student_train.finetune.tuned import Tuned, load_tuned, save_tuned
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.shapes import CLASSES, coco_shapes
from support.tiny import contents

MANUAL = Path(__file__).parents[3] / "docs" / "shipping.md"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    coco_shapes(folder, "train", 3, seed=1)
    pack(PackConfig(source=str(folder / "train"), out=folder / "pictures.beton", workers=1))
    return folder / "pictures.beton"


def a_detector(path: Path, name: str = "test_resnet", masks: bool = False, sure: float = 20.0) -> Path:
    """Random weights, whose classes are told apart: ``sure`` 0 is a detector that finds nothing."""
    torch.manual_seed(0)
    student = StudentConfig(name, 64, small_images=False)
    info, head = describe_student(student), {"masks": masks, "side": 64, "channels": 16}
    model = build_detector(build_student(student), info, len(CLASSES), **head)  # type: ignore[arg-type]
    with torch.no_grad():
        predictor = model.roi_heads.box_predictor.cls_score
        predictor.weight.mul_(sure)
        predictor.bias.copy_(torch.tensor([0.0 if sure else 9.0, 0, 0]))
    save_tuned(model, Tuned("detect", info.to_dict(), CLASSES, head), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masks", "form"), [("test_resnet", True, "uint8"), ("test_vit", False, "unit")])
def test_the_file_finds_what_torch_finds_in_pictures_of_any_size(
    tmp_path, pictures, name, masks, form, monkeypatch, capsys
):
    weights = a_detector(tmp_path / "runs" / "student" / "eval" / "detect.safetensors", name, masks)
    (entry,) = export(ExportConfig(weights, data=pictures, input_form=form))
    assert (entry.file, entry.agreement, entry.int8_share) == ("detect.onnx", None, None)
    assert entry.boxes is not None
    assert entry.boxes.images == 3
    assert entry.boxes.boxes > 50
    assert entry.score == entry.boxes.same > 0.99
    session = onnxruntime.InferenceSession(weights.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["rob"])
    assert (told["task"], told["classes"], told["first_label"], told["side"]) == ("detect", list(CLASSES), 1, 64)
    detector, _ = load_tuned(weights)
    names = ["boxes", "labels", "scores", *(["masks"] if masks else [])]
    assert [output.name for output in session.get_outputs()] == names
    for height, width in ((50, 90), (120, 70)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        unit = pixels.transpose(2, 0, 1).astype(np.float32) / 255
        found = session.run(None, {"image": (pixels if form == "uint8" else unit)[None]})
        with torch.no_grad():
            (expected,) = detector([torch.from_numpy(unit)])
        assert len(expected["scores"]) > 10
        for output, values in zip(names, found, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(values),
                expected[output][:, 0] if output == "masks" else expected[output],
                rtol=1e-3,
                atol=1e-2,
            )
    # It lies among the results of evaluations, and is none.
    assert read_exports(weights.parent) == {"detect.onnx": entry}
    assert read_results(weights.parents[1]) == {}
    if form == "uint8":  # the manual's lines, as they stand
        scripts = re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.DOTALL)
        (script,) = (script for script in scripts if "detect.onnx" in script)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["detect.py", "photo.png"])
        exec(script, {})
        first = capsys.readouterr().out.splitlines()[0].split()
        assert first[0] == CLASSES[expected["labels"][0] - 1]
        assert [float(word) for word in first[2:]] == pytest.approx(expected["boxes"][0].tolist(), abs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "a detector's file is checked on what it finds: give `data`"),
        ({"int8": True}, "`int8`: a detector is written in float32 alone"),
        ({"to": ("onnx", "torch")}, "`to` torch: a detector becomes onnx alone"),
        ({"opset": 21}, "`opset` 21: .* knows 20 at most"),
    ],
)
def test_what_a_detector_does_not_become(tmp_path, pictures, changes, message):
    weights = a_detector(tmp_path / "detect.safetensors")
    with pytest.raises(MisuseError, match=message):
        export(ExportConfig(weights, **{"data": pictures, **changes}))
    assert list(contents(tmp_path)) == ["detect.safetensors"]


@pytest.mark.slow
def test_a_detectors_file_that_cannot_be_checked_or_disagrees_is_not_kept(tmp_path, monkeypatch, pictures):
    blind = a_detector(tmp_path / "blind" / "detect.safetensors", sure=0.0)
    with pytest.raises(FailureError, match="torch finds nothing in 3 pictures of `data`"):
        export(ExportConfig(blind, data=pictures))
    weights = a_detector(tmp_path / "detector" / "detect.safetensors")
    load = module.load_detector

    def half(path: Path):
        run = load(path)
        return lambda image: [values[::2] for values in run(image)]

    monkeypatch.setattr(module, "load_detector", half)
    with pytest.raises(
        FailureError, match=r"detect.onnx is not kept: on 3 images 6\d.\d\d% of torch's .* 0.99 is expected"
    ):
        export(ExportConfig(weights, data=pictures))
    assert [list(contents(path.parent)) for path in (blind, weights)] == [["detect.safetensors"]] * 2


def test_boxes_agree_by_class_place_score_and_mask():
    def some(boxes, labels, scores, masks=None) -> Boxes:
        return Boxes(torch.tensor(boxes).float().view(-1, 4), torch.tensor(labels), torch.tensor(scores), masks)

    one, two = [0, 0, 10, 10], [20, 20, 30, 30]
    torchs = some([one, two], [1, 2], [0.9, 0.8])
    same = agreement_of_boxes([some([two, one], [2, 1], [0.8, 0.9])], [torchs])
    assert asdict(same) == {"images": 1, "boxes": 2, "same": 1.0, "lowest_iou": 1.0, "largest_difference": 0.0}
    nothing = some([], torch.zeros(0, dtype=torch.int64).tolist(), [])
    for other, share in (
        (some([one, two], [1, 1], [0.9, 0.8]), 1 / 2),  # another class
        (some([one, [20, 20, 30, 28]], [1, 2], [0.9, 0.8]), 1 / 2),  # another place
        (some([one, two], [1, 2], [0.9, 0.7]), 1 / 2),  # another score
        (some([one, one, two], [1, 1, 2], [0.9, 0.9, 0.8]), 4 / 5),  # one too many
        (nothing, 0.0),
    ):
        assert agreement_of_boxes([other], [torchs]).same == pytest.approx(share)
    assert agreement_of_boxes([nothing], [nothing]).same == 1
    left, right = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    left[0, :, :4] = right[0, :, 4:] = 1
    masked = [some([one], [1], [0.9], masks) for masks in (left, right)]
    assert agreement_of_boxes(masked[:1], masked[1:]).same == 0
    assert agreement_of_boxes(masked[:1], masked[:1]).same == 1
