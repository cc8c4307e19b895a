"""rob finetune: classifiers and segmenters that learn, go on after a kill to the last byte, and become files for devices."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from rob.common.errors import FailureError, MisuseError
from rob.common.images.pack import PackConfig, pack
from rob.common.records import sealed
from rob.common.run import seed_everything
from rob.student_train import epochs
from rob.student_train.check import check
from rob.student_train.checkpoint import export_weights, load_checkpoint
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.finetune.classify import CROPS, Mixing, finetune_classifier
from rob.student_train.finetune.config import ClassifyConfig, SegmentConfig
from rob.student_train.finetune.folder import TuneProgress, training_of
from rob.student_train.finetune.segment import finetune_segmenter
from rob.student_train.finetune.tuned import Tuned, load_tuned, save_tuned
from rob.student_train.report.run import read_runs
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.shapes import mask_shapes
from support.tiny import contents, tiny_images
from support.training import LOADER

COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220), "green": (40, 200, 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("run"), StudentConfig("test_resnet", 32, small_images=False))


def a_run(folder: Path, student: StudentConfig) -> Path:
    torch.manual_seed(0)
    export_weights(build_student(student), describe_student(student), folder / "student.safetensors")
    return folder


def coloured(folder: Path, out: Path, n: int, names: tuple[str, ...] = ("red", "blue", "green"), seed: int = 0) -> Path:
    """``n`` packed pictures, noise of a colour by turns, in one folder a colour."""
    random = np.random.default_rng(seed)
    for row in range(n):
        name = names[row % len(names)]
        path = folder / name / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = random.integers(-40, 40, (32, 32, 3))
        Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)).save(path)
    pack(PackConfig(source=str(folder), out=out, workers=1))
    return out


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("colours")
    # Two classes to validate on, which by themselves would be numbered otherwise.
    return (
        coloured(folder / "train", folder / "train.beton", 24),
        coloured(folder / "val", folder / "val.beton", 8, ("red", "green"), seed=1),
    )


def classify(run: Path, colours: tuple[Path, Path], out: Path, **changes) -> ClassifyConfig:
    settings = {"epochs": 3, "device": "cpu", "loader": LOADER, "lr": 1e-3}
    return ClassifyConfig(run, *colours, out, **(settings | changes))


def segment(run: Path, data: Path, out: Path, **changes) -> SegmentConfig:
    settings = {"size": 64, "channels": 16, "epochs": 2, "batch_size": 4, "lr": 3e-3, "device": "cpu"}
    return SegmentConfig(run, data / "train", data / "val", out, **(settings | changes))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    mask_shapes(folder / "train", 16, seed=1)
    mask_shapes(folder / "val", 3, seed=2)
    return folder


def killed_after_an_epoch(monkeypatch, work) -> None:
    save = epochs.save_checkpoint

    def killed(*rest):
        save(*rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            work()


# ==== classifiers ====


@pytest.mark.slow
def test_a_classifier_learns_goes_on_after_a_kill_and_is_exported(run, colours, tmp_path, monkeypatch):
    # Everything that draws: views, erasing, mixing.
    whole = finetune_classifier(classify(run, colours, tmp_path / "whole", augment="heavy"))
    assert whole.top1 == 100
    assert whole.per_class == {"blue": None, "green": 100, "red": 100}
    config = classify(run, colours, tmp_path / "cut", augment="heavy")
    killed_after_an_epoch(monkeypatch, lambda: finetune_classifier(config))
    assert not (tmp_path / "cut" / "classifier.safetensors").exists()
    assert finetune_classifier(config).top1 == whole.top1
    assert (tmp_path / "cut" / "classifier.safetensors").read_bytes() == whole.weights.read_bytes()
    with pytest.raises(MisuseError, match=r"made with lr = 0.001, this run has lr = 0.01"):
        finetune_classifier(classify(run, colours, tmp_path / "cut", augment="heavy", lr=0.01))

    (entry, eight_bits) = export(ExportConfig(tmp_path / "cut", data=colours[1], int8=True, loader=LOADER))
    assert entry.agreement is not None
    assert (entry.agreement.same, entry.agreement.top1, entry.agreement.top1_torch) == (1, 100, 100)
    assert entry.output == {
        "name": "logits",
        "dtype": "float32",
        "shape": ["batch", 3],
        "classes": ["blue", "green", "red"],
    }
    assert (eight_bits.file, eight_bits.precision) == ("classifier.int8.onnx", "int8")
    session = onnxruntime.InferenceSession(tmp_path / "cut" / "classifier.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["rob"])
    assert (told["task"], told["classes"]) == ("classify", ["blue", "green", "red"])
    pixels = np.full((2, 32, 32, 3), COLOURS["green"], np.uint8)
    (logits,) = session.run(None, {"image": pixels})
    model, tuned = load_tuned(tmp_path / "cut")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tuned.info.mean, tuned.info.std))
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)  # no softmax
    assert logits.argmax(1).tolist() == [1, 1]


def test_the_best_epoch_is_kept_and_not_the_last(run, colours, tmp_path, monkeypatch):
    scores = iter([50.0, 75.0, 75.0])
    seen = []
    save = epochs.save_checkpoint
    monkeypatch.setattr(
        epochs,
        "save_checkpoint",
        lambda path, state, config: seen.append(state["model"]["fc.weight"].clone()) or save(path, state, config),
    )
    train = epochs.train_epochs
    monkeypatch.setattr(
        "rob.student_train.finetune.classify.train_epochs",
        lambda training, validate, *rest: train(training, lambda: {"top1": next(scores)}, *rest),
    )
    result = finetune_classifier(classify(run, colours, tmp_path / "out"))
    assert result.best_epoch == 2
    assert torch.equal(load_tuned(tmp_path / "out")[0].fc.weight, seen[1])  # type: ignore[union-attr, arg-type]
    assert not torch.equal(seen[1], seen[2])


def test_a_loss_that_is_no_number_ends_the_training_at_its_step(tmp_path):
    model, kept = nn.Linear(1, 1), epochs.Kept(tmp_path / "checkpoint.pt", {})
    training = epochs.Training(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        batches=lambda epoch: [1.0, torch.nan if epoch else 1.0],
        loss=lambda factor: factor * model(torch.ones(1, 1)).sum(),
        rate=lambda step, epoch: 1.0,
        epochs=2,
        steps_per_epoch=2,
        device=torch.device("cpu"),
    )
    with pytest.raises(FailureError, match=r"^step 4: the loss is nan; lower `lr`"):
        epochs.train_epochs(training, kept=kept)
    saved = load_checkpoint(kept.checkpoint, {})
    assert len(saved["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_it_begins_with_regression_on_the_students_features(run, colours, tmp_path):
    """With a rate of nearly nothing that alone is what is measured; random weights have no such start."""
    nothing = {"lr": 1e-8, "epochs": 1}
    assert finetune_classifier(classify(run, colours, tmp_path / "student", **nothing)).top1 == 100
    random = finetune_classifier(classify(run, colours, tmp_path / "random", init="random", **nothing))
    assert random.top1 < 100


def test_labels_that_cannot_be_are_refused(run, colours, tmp_path):
    train, val = colours
    one = coloured(tmp_path / "one", tmp_path / "one.beton", 2, ("red",))
    two = coloured(tmp_path / "two", tmp_path / "two.beton", 4, ("red", "green"))
    flat = tiny_images(tmp_path / "flat", 2, classes=1) / "class0"
    pack(PackConfig(source=str(flat), out=tmp_path / "flat.beton", workers=1))
    out = tmp_path / "out"
    for pair, said in (
        ((tmp_path / "flat.beton", val), "has no labels"),
        ((one, one), "has one class, 'red'"),
        ((two, train), "class 'blue' of the test set is not in the training set"),
    ):
        with pytest.raises(MisuseError, match=said):
            finetune_classifier(classify(run, pair, out))
    with pytest.raises(MisuseError, match=r"holds student\.safetensors, of something else"):
        finetune_classifier(classify(run, colours, run))
    assert not out.exists()


def test_biases_norms_and_embeddings_of_a_vit_do_not_decay():
    model = nn.ModuleDict({"backbone": build_student(StudentConfig("test_vit", 32)), "head": nn.Linear(64, 3)})
    config = SimpleNamespace(weight_decay=0.05, lr=1e-3, epochs=1, seed=0)
    start = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    groups = training_of(
        config, start, model, 1, lambda epoch: [], lambda batch: torch.zeros(())
    ).optimiser.param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        still = parameter.ndim < 2 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert decay[id(parameter)] == (0 if still else 0.05), name


def mixed(run, colours, out, images: torch.Tensor, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    seed_everything(0)  # timm draws from all of them
    mixing = Mixing(classify(run, colours, out, **settings), 3, torch.device("cpu"))
    return mixing(images.clone(), torch.arange(len(images)) % 3)


def test_heavy_erases_and_mixes_pairs(run, colours, tmp_path):
    images = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 3, 32, 32)
    labels = torch.arange(32) % 3
    same, unmixed = mixed(run, colours, tmp_path, images, augment="light")
    assert torch.equal(same, images) and torch.equal(unmixed, labels)
    _, soft = mixed(run, colours, tmp_path, images, augment="heavy", smoothing=0.0)
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    assert ((soft > 0).sum(1) == 2).any()  # of two images
    _, smooth = mixed(run, colours, tmp_path, images, augment="heavy", smoothing=0.3)
    assert smooth.min() > 0.05
    erased, unmixed = mixed(run, colours, tmp_path, images, augment="heavy", mixup=0.0, cutmix=0.0)
    changed = (erased != images).flatten(1).any(1)
    assert changed.any() and not changed.all() and torch.equal(unmixed, labels)
    halves, soft = mixed(run, colours, tmp_path, images, augment="light", mixup=1.0)
    assert not torch.equal(halves, images) and soft.shape == (32, 3)
    odd, soft = mixed(run, colours, tmp_path, images[:31], augment="light", mixup=1.0)
    assert len(odd) == len(soft) == 30 and not torch.equal(odd, images[:30])
    least = [CROPS[name].scale[0] for name in ("light", "medium", "heavy")]
    assert least == sorted(least, reverse=True)


def test_a_refusal_leaves_the_folder_as_it_was(run, colours, tmp_path):
    finetune_classifier(classify(run, colours, tmp_path / "tuned", epochs=1))
    before = contents(tmp_path / "tuned")
    with pytest.raises(MisuseError, match=r"was made with lr = 0\.001, this run has lr = 0\.002"):
        finetune_classifier(classify(run, colours, tmp_path / "tuned", epochs=1, lr=2e-3))
    assert contents(tmp_path / "tuned") == before
    assert check(tmp_path / "tuned").damaged == ()
    with pytest.raises(MisuseError, match="is of rob finetune: a report is of runs of rob train-student"):
        read_runs([tmp_path / "tuned"])
    (tmp_path / "tuned" / "checkpoint.pt").unlink()
    with pytest.raises(MisuseError, match=r"has classifier\.safetensors and no checkpoint\.pt .*pass `overwrite`"):
        finetune_classifier(classify(run, colours, tmp_path / "tuned", epochs=1))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_bytes(sealed({"student": {}}))
    (stopped / "checkpoint.pt").write_text("of a run that goes on")
    with pytest.raises(MisuseError, match="is a run of rob train-student: give the fine-tuned network a folder"):
        finetune_classifier(classify(run, colours, stopped, overwrite=True))
    assert (stopped / "checkpoint.pt").exists()


def test_the_images_of_training_as_validation_are_said(run, colours, tmp_path):
    notes: list[str] = []
    config = ClassifyConfig(run, colours[0], colours[0], tmp_path, epochs=1, device="cpu", loader=LOADER)
    finetune_classifier(config, TuneProgress(note=notes.append))
    assert any("holds the very images of" in note for note in notes)


def test_labels_are_smoothed(run, colours, tmp_path):
    losses = []
    for smoothing in (0.0, 0.5):
        out = tmp_path / str(smoothing)
        finetune_classifier(classify(run, colours, out, epochs=1, smoothing=smoothing, lr=1e-8))
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] > losses[0] + 0.1


def test_a_network_whose_layers_share_a_tensor_is_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    save_tuned(tied, Tuned("classify", {}, ("a",), {}), tmp_path / "classifier.safetensors")
    saved = load_file(tmp_path / "classifier.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tied.state_dict().items())


# ==== segmenters ====


def test_a_segmenter_learns_and_goes_on_after_a_kill(run, shapes, tmp_path, monkeypatch):
    settings = {"epochs": 4, "lr": 1e-2, "colour": 0.0, "crop": 0.8}
    config = segment(run, shapes, tmp_path / "cut", **settings)
    killed_after_an_epoch(monkeypatch, lambda: finetune_segmenter(config))
    result = finetune_segmenter(config)
    whole = finetune_segmenter(segment(run, shapes, tmp_path / "whole", **settings))
    assert result.weights.read_bytes() == whole.weights.read_bytes()
    assert result.score == whole.score
    assert result.score.miou > 35  # nothing everywhere: 28


def test_any_seed_will_do(run, shapes, tmp_path):
    finetune_segmenter(segment(run, shapes, tmp_path / "out", epochs=1, seed=20261127))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), [("test_resnet", "onnx"), ("test_vit", "torch")])
def test_a_segmenter_is_exported(name, to, shapes, tmp_path):
    run = a_run(tmp_path / "run", StudentConfig(name, 32, small_images=False))
    finetune_segmenter(segment(run, shapes, tmp_path / "out", epochs=1))
    (entry,) = export(ExportConfig(tmp_path / "out", (to,), loader=LOADER))
    assert entry.agreement is not None
    assert entry.agreement.same == pytest.approx(1, abs=1e-3)
    assert entry.output["shape"] == ["batch", 3, 64, 64]
    assert entry.input["crop"] is None  # the whole picture, as in training
    if to == "torch":  # ONNX of a ViT takes seconds, and is tested where features are exported
        return
    session = onnxruntime.InferenceSession(tmp_path / "out" / "segmenter.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((1, 64, 64, 3), np.uint8)})[0].shape == (1, 3, 64, 64)


def test_masks_of_one_class_are_refused(run, shapes, tmp_path):
    folder = mask_shapes(tmp_path / "data" / "train", 1, seed=1)
    Image.new("L", (64, 64)).save(folder / "masks" / "000.png")
    with pytest.raises(MisuseError, match="has pixels of one class, 'nothing'"):
        finetune_segmenter(SegmentConfig(run, folder, folder, tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()
