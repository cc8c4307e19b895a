"""A run becomes files for devices. Each is written aside, run in its own runtime on images, compared with torch, and only then
put in its place."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...common.errors import FailureError, MisuseError
from ...common.files import locked
from ...common.run import versions
from ...common.timing import median_ms
from .agreement import agreement, agreement_of_logits, hold
from .config import WITH_INT8, ExportConfig
from .detector import check_for_detector, of_detector
from .exported_file import ExportedFile, read_exports, size_of, write_exports
from .formats import FORMATS, Format
from .graph import Graph, Runner, in_a_sentence
from .input_form import WithInput
from .sample import Sample, take_sample
from .subject import Subject, open_subject
from .timm_folder import check_for_timm

BATCH = 32
"""Images that a file is run on at a time, where it takes more than one."""
MIN_SHARE = 0.9
"""Of the weights that must be 8-bit: converters leave what they do not know as it is, and say nothing."""
STAGING = ".export"
"""The folder that files are written in until they are checked."""


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
    if subject.task == "detect":
        check_for_detector(config)
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent)
    if folder.is_file():
        raise MisuseError(f"`out` {folder} is a file: name a folder, which is made where there is none")
    wanted = _wanted(config, folder, subject.stem)
    for name in config.to:
        FORMATS[name].check_installed(name)
    if "timm" in config.to:
        check_for_timm(subject.info, config.run, subject.task)
    read_exports(folder)  # damaged, it is said before hours of work
    write = of_detector(subject, config) if subject.task == "detect" else _of_images(subject, config, folder)

    done: list[ExportedFile] = []
    taken = f"{folder}: another rob export is writing there: wait for it, or give another `out`"
    with locked(folder / f"{STAGING}.lock", taken):
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
        staging.mkdir()
        try:
            for number, (name, precision, target) in enumerate(wanted):
                progress(number, len(wanted), target.name)
                path = staging / target.name
                entry = replace(write(name, precision, path), format=name, weights=subject.weights)
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


# ==== one file ====


def _of_images(subject: Subject, config: ExportConfig, folder: Path) -> Callable[[str, str, Path], ExportedFile]:
    """What writes and checks a file of a format and precision, of a network that takes images of one size. ``folder`` has the
    float files that int8 is made of."""
    info, sample = subject.info, take_sample(subject, config)
    reference: dict[str, Tensor] = {}

    def write(name: str, precision: str, path: Path) -> ExportedFile:
        form = FORMATS[name].only_input or config.input_form
        graph = Graph(
            WithInput(subject.network, form, info.image_size, info.mean, info.std).eval(),
            info,
            config.opset,
            subject.facts(form),
            subject.output,
            subject.classes,
            subject.crop,
        )
        if form not in reference:
            reference[form] = _torch_features(graph.network, sample.pixels)
        full = folder / f"{subject.stem}{FORMATS[name].suffix}"
        return _write_and_check(config, FORMATS[name], precision, graph, path, full, sample, reference[form])

    return write


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
    with in_a_sentence(graph.info.name, path.name, kind.runtime):
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
    found = latency = None
    if kind.load is not None:
        runner = kind.load(path)
        batch = kind.batch or BATCH
        features = _run(runner, graph.network, sample.pixels, batch)
        compared = agreement if graph.classes is None else agreement_of_logits
        found = compared(features, torchs, sample.labels)
        hold(found, int8, config.min_agreement, path.name)
        one = graph.network.prepare(sample.pixels[:1]).numpy()
        latency = round(median_ms(lambda: runner(one)), 3)
    form, size = graph.network.form, graph.network.size
    picture = [size, size, 3] if form == "uint8" else [3, size, size]
    return ExportedFile(
        file=path.name,
        format="",
        precision=precision,
        bytes=size_of(path),
        student=graph.info.name,
        weights="",
        input={
            "name": "image",
            "form": form,
            "dtype": "uint8" if form == "uint8" else "float32",
            "shape": [kind.batch or "batch", *picture],
            "crop": graph.crop,
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
