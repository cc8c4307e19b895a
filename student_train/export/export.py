"""A run becomes files for devices. Each is written aside, run in its own runtime on images, compared with torch, and only then
put in its place."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import FailureError, MisuseError
from ...common.files import locked
from ...common.images.beton import Beton
from ...common.run import versions
from ...common.timing import median_ms
from ..evaluate.network import SMALL_SIDE, FrozenNetwork
from .agreement import Agreement, agreement, agreement_of_logits
from .config import WITH_INT8, ExportConfig
from .exported_file import ExportedFile, read_exports, write_exports
from .formats import FORMATS, Format
from .graph import Graph, Runner
from .input_form import WithInput, to_pixels
from .onnx_file import FACTS
from .subject import Subject, open_subject
from .timm_folder import check_for_timm

BATCH = 32
"""Images that a file is run on at a time, where it takes more than one."""
MIN_SHARE = 0.9
"""Of the weights that must be 8-bit: converters leave what they do not know as it is, and say nothing."""
DRAWN = 64
"""Pictures drawn to check a float file on, where there are no images."""
PICTURES_OF_LOGITS = 50
"""At most so many images are compared where every pixel has its logits."""
STAGING = ".export"
"""The folder that files are written in until they are checked."""


@dataclass(frozen=True)
class Sample:
    """The images of an export: pixels (N, S, S, 3) uint8 to check on and to calibrate on, labels (N,) of the former if known."""

    pixels: Tensor
    calibration: Tensor
    labels: Tensor | None
    source: str


def export(
    config: ExportConfig,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[ExportedFile]:
    """Write, check and keep one file for each format, and with ``int8`` one more; ``export.json`` beside them tells of each.

    MisuseError: no student there, a format whose packages are missing or that cannot hold it, files that are there already.
    FailureError: a file does not agree with torch, or cannot be written; those that were done before it are kept.
    """
    subject = open_subject(config.run, config.size)
    info = subject.info
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent)
    wanted = _wanted(config, folder, subject.stem)
    for name in config.to:
        FORMATS[name].check_installed(name)
    if "timm" in config.to:
        check_for_timm(info, config.run, subject.task)
    read_exports(folder)  # damaged, it is said before hours of work
    sample = _sample(subject, config)

    done: list[ExportedFile] = []
    reference: dict[str, Tensor] = {}
    taken = f"{folder}: another rob export is writing there: wait for it, or give another `out`"
    with locked(folder / f"{STAGING}.lock", taken):
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
        staging.mkdir()
        try:
            for number, (name, precision, target) in enumerate(wanted):
                progress(number, len(wanted), target.name)
                form = FORMATS[name].only_input or config.input_form
                graph = Graph(
                    WithInput(subject.network, form, info.image_size, info.mean, info.std).eval(),
                    info,
                    config.opset,
                    {FACTS: json.dumps(_facts(subject, form)), **subject.told},
                    subject.output,
                    subject.classes,
                )
                if form not in reference:
                    reference[form] = _torch_features(graph.network, sample.pixels)
                full, path = folder / f"{subject.stem}{FORMATS[name].suffix}", staging / target.name
                found = _write_and_check(config, FORMATS[name], precision, graph, path, full, sample, reference[form])
                entry = replace(found, format=name, weights=subject.weights)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
                write_exports(folder, [entry])
                done.append(entry)
                progress(number + 1, len(wanted), target.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if "coreml" in config.to:
        what = (
            "; of int8 the weights alone have 8 bits, since activations are calibrated on a Mac" if config.int8 else ""
        )
        note(
            f"coreml: converted, not checked: an .mlpackage runs on a Mac only; compare it there with torch's features{what}"
        )
    return done


# ==== before anything is written ====


def _wanted(config: ExportConfig, folder: Path, stem: str) -> list[tuple[str, str, Path]]:
    """Format, precision and path of every file. MisuseError: one of them is there already."""
    wanted = []
    for name in dict.fromkeys(config.to):
        suffix = FORMATS[name].suffix
        wanted.append((name, FORMATS[name].precision, folder / (f"{stem}{suffix}" if suffix else name)))
        if config.int8 and name in WITH_INT8:
            wanted.append((name, "int8", folder / f"{stem}.int8{suffix}"))
    for _, _, path in wanted:
        if path.exists() and not config.overwrite:
            raise MisuseError(f"{path} is there already: pass `overwrite` to replace it, or give another `out`")
    return wanted


def _facts(subject: Subject, form: str) -> dict[str, object]:
    """What a file says of itself."""
    info = subject.info
    crop = 1.0 if info.image_size <= SMALL_SIDE else 0.875  # of the shorter side, as evaluations look at an image
    facts = {
        "input": form,
        "size": info.image_size,
        "crop": crop,
        "mean": info.mean,
        "std": info.std,
        "student": info.name,
    }
    tuned = {"task": subject.task, "classes": subject.classes} if subject.task else {}
    return {**facts, **tuned, "weights": subject.weights, **versions("rob")}


def _sample(subject: Subject, config: ExportConfig) -> Sample:
    """Images of ``data``, the same for every network; without them drawn pictures."""
    info, cpu = subject.info, torch.device("cpu")
    network = FrozenNetwork(info.name, subject.network, info.image_size, info.mean, info.std, subject.weights, cpu)
    most = min(config.images, PICTURES_OF_LOGITS) if subject.task == "segment" else config.images
    generator = torch.Generator().manual_seed(0)
    if config.data is None:
        coarse = torch.rand(DRAWN, 3, 6, 6, generator=generator)
        pictures = F.interpolate(coarse, (network.size, network.size), mode="bicubic").clamp(0, 1)
        pixels = (255 * pictures).byte().permute(0, 2, 3, 1).contiguous()
        return Sample(pixels, pixels[:0], None, "drawn pictures")
    data = Beton(config.data)
    if data.num_images < 2:
        raise MisuseError(f"`data` {config.data} has {data.num_images} image: give two or more")
    order = torch.randperm(data.num_images, generator=generator)
    checked = order[:most]
    calibrated = order[-config.calibration :] if config.int8 else order[:0]
    ids = torch.cat([checked, calibrated]).unique()
    row = torch.full((data.num_images,), -1)
    row[ids] = torch.arange(len(ids))
    pixels = torch.empty((len(ids), network.size, network.size, 3), dtype=torch.uint8)
    for image_ids, images in network.centred(data, config.loader, ids.numpy()):
        pixels[row[image_ids]] = to_pixels(images, network.mean, network.std)
    labels = None if data.labels is None else torch.as_tensor(data.labels, dtype=torch.int64)[checked]
    if subject.task is not None:
        labels = _as_classes(labels, data.manifest.classes, subject)
    return Sample(pixels[row[checked]], pixels[row[calibrated]], labels, data.manifest.fingerprint)


def _as_classes(labels: Tensor | None, names: tuple[str, ...] | None, subject: Subject) -> Tensor | None:
    """Labels as the classifier numbers them, by name; None where an image has none, or one that it does not know."""
    if subject.task != "classify" or labels is None or labels.min() < 0 or subject.classes is None:
        return None
    numbers = {name: number for number, name in enumerate(subject.classes)}
    named = names or tuple(map(str, range(int(labels.max()) + 1)))
    found = torch.tensor([numbers.get(name, -1) for name in named])[labels]
    return None if found.min() < 0 else found


# ==== one file ====


def _write_and_check(
    config: ExportConfig,
    kind: Format,
    precision: str,
    graph: Graph,
    path: Path,
    full: Path,
    sample: Sample,
    torchs: Tensor,
) -> ExportedFile:
    """``path``, written and compared; int8 is made from ``full``, which holds float32. FailureError: it differs too much."""
    int8 = precision == "int8"
    share = None
    try:
        if int8:
            batches = [graph.network.prepare(pixels).numpy() for pixels in sample.calibration.split(BATCH)]
            assert kind.write_int8 is not None
            share = kind.write_int8(graph, full, path, batches, config.calibrate)
            if share < MIN_SHARE:
                raise FailureError(
                    f"only {share:.0%} of the weights became int8, expected {MIN_SHARE:.0%} or more: use float32"
                )
        else:
            kind.write(graph, path)
    except (MisuseError, FailureError, MemoryError):
        raise
    except OSError as error:
        raise FailureError(f"cannot write {path.name}: {error.strerror or error}") from error
    except Exception as error:  # converters have errors of their own, and long ones
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FailureError(f"{graph.info.name} does not become {path.name} by {kind.runtime}: {reason}") from error
    found = latency = None
    if kind.load is not None:
        runner = kind.load(path)
        batch = kind.batch or BATCH
        features = _run(runner, graph.network, sample.pixels, batch)
        compared = agreement if graph.classes is None else agreement_of_logits
        found = compared(features, torchs, sample.labels)
        _hold(found, int8, config.min_agreement, path.name)
        one = graph.network.prepare(sample.pixels[:1]).numpy()
        latency = round(median_ms(lambda: runner(one)), 3)
    form, size = graph.network.form, graph.network.size
    picture = [size, size, 3] if form == "uint8" else [3, size, size]
    return ExportedFile(
        file=path.name,
        format="",
        precision=precision,
        bytes=_size(path),
        student=graph.info.name,
        weights="",
        input={
            "name": "image",
            "form": form,
            "dtype": "uint8" if form == "uint8" else "float32",
            "shape": [kind.batch or "batch", *picture],
            "mean": list(graph.info.mean),
            "std": list(graph.info.std),
        },
        output={
            "name": graph.output,
            "dtype": "float32",
            "shape": [kind.batch or "batch", *torchs.shape[1:]],
            **({} if graph.classes is None else {"classes": list(graph.classes)}),
        },
        runtime=f"{kind.runtime} {versions(kind.runtime)[kind.runtime]}",
        agreement=found,
        checked_on=sample.source,
        latency_ms=latency,
        int8_share=share,
        calibration_images=len(sample.calibration) if int8 else None,
        versions=versions("rob", "torch", "timm", kind.runtime),
    )


@torch.no_grad()
def _torch_features(network: WithInput, pixels: Tensor) -> Tensor:
    return torch.cat([network(network.prepare(part)) for part in pixels.split(BATCH)])


def _run(runner: Runner, network: WithInput, pixels: Tensor, batch: int) -> Tensor:
    parts: Sequence[np.ndarray] = [runner(network.prepare(part).numpy()) for part in pixels.split(batch)]
    return torch.from_numpy(np.concatenate(parts))


def _hold(found: Agreement, int8: bool, asked: float | None, name: str) -> None:
    """FailureError: less agreement than asked for. Written so that NaN is less."""
    score, least = found.score(int8), found.lowest_score(int8) if asked is None else asked
    if score >= least:
        return
    if not int8:
        said = f"the smallest cosine with torch's output is {score:.6f}"
    elif found.same is not None and found.top1 is not None:
        said = f"top-1 falls from {found.top1_torch:.2f} to {found.top1:.2f} %, an agreement of {score:.4f}"
    elif found.same is not None:
        said = f"the class is torch's for {score:.2%} of what is classified"
    elif found.knn is not None:
        said = f"k-NN top-1 falls from {found.knn_torch:.2f} to {found.knn:.2f} %, an agreement of {score:.4f}"
    else:
        said = f"the nearest neighbour is among torch's five for {score:.2%} of the images"
    raise FailureError(
        f"{name} is not kept: on {found.images} images {said}, and {least:g} is expected (`min_agreement`)"
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
