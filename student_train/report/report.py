"""``report``: what runs did, on one page that needs no network."""

import os
import platform
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from markupsafe import Markup

from ...common.errors import BRINGS, MisuseError
from ...common.files import refuse_existing, replacing
from ...common.images.beton import Beton
from ...common.run import pick_device, versions
from .config import ReportConfig
from .curves import curves, over_time
from .embedding_map import maps
from .looks import looks
from .neighbours import neighbours
from .page import caption, code, document, join, missing, table, tag
from .patches import patches
from .run import Run, read_runs
from .scores import evaluations, exports
from .settings import settings
from .sheet import sheet
from .shown_images import Images, examples, look_at, open_images
from .summary import summary

PACKAGES = ("rob", "torch", "torchvision", "timm", "ffcv", "numpy", "zarr", "plotly")


def report(config: ReportConfig, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> Path:
    """Write ``config.out``. What a run has not is a sentence in its place, with the command that brings it.

    MisuseError: a folder is no run, one of its files is damaged, given images are not there or not the run's, the file is there
    already, or plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MisuseError(f"a report needs plotly, not installed here: {BRINGS.format('report')}")
    refuse_existing(config.out, config.overwrite)
    runs, device = read_runs(config.runs), pick_device(config.device)
    total, done = 2 * len(runs) + 2, 0

    def advance(what: str = "features") -> None:
        nonlocal done
        done += 1
        progress(done, total, what)

    data, absent = _training_images(config, runs[0])
    test = open_images(config.test, "test", None) if config.test else None
    trained = None if data is None else look_at(data, runs, config, device, advance)
    tested = trained if test is None else look_at(test, runs, config, device, advance)
    sections = [
        ("runs", "Runs", summary(runs)),
        ("settings", "Settings", settings(runs)),
        ("training", "Training", curves(runs)),
        ("knn", "Accuracy in the course of training", over_time(runs)),
        ("evaluation", "Evaluation", evaluations(runs)),
        ("views", "Views", _views(runs, trained, config) or absent),
        (
            "neighbours",
            "Nearest neighbours",
            _of_features(trained, lambda i: neighbours(runs, i, examples(i, config.examples)), absent),
        ),
        ("map", "Map of the embeddings", _of_features(tested, lambda i: maps(runs, i), absent)),
        (
            "looks",
            "Where the students look",
            _of_features(tested, lambda i: looks(runs, i, examples(i, config.examples), config, device), absent),
        ),
        (
            "patches",
            "What is alike within images",
            _of_features(trained, lambda i: patches(runs, i, examples(i, config.examples), config, device), absent),
        ),
        ("exports", "Exported files", exports(runs)),
        ("versions", "Versions", _versions(runs, device)),
    ]
    names = ", ".join(run.name for run in runs)
    lead = tag(
        "p",
        f"rob's report of {len(runs)} run{'s' if len(runs) > 1 else ''}: nothing here was sent or is fetched.",
        class_="lead",
    )
    with replacing(config.out) as file:
        file.write(document(names, lead, sections).encode())
    progress(total, total, "written")
    return config.out


def _training_images(config: ReportConfig, first: Run) -> tuple[Beton | None, Markup]:
    """The images, or what is said in their place."""
    fingerprint = first.settings.get("data_fingerprint")
    if config.data is not None:
        return open_images(config.data, "data", fingerprint), Markup()
    if first.data is None:
        return None, missing(f"{first.name} does not say which images it was trained on.")
    try:
        return open_images(first.data, None, fingerprint), Markup()
    except FileNotFoundError as problem:
        words = " ".join(map(str, config.runs))
        return None, missing(
            f"The images are not at hand: {problem}.", code("rob report", words, "--data DATA.beton"), "shows them."
        )


def _views(runs: Sequence[Run], images: Images | None, config: ReportConfig) -> Markup | None:
    if images is None:
        return None
    if "recipe" not in runs[0].settings:
        return missing(f"{runs[0].name} does not say how its views were drawn.")
    return sheet(runs[0], images, examples(images, config.examples))


def _of_features(images: Images | None, shown: Callable[[Images], Markup], absent: Markup) -> Markup:
    if images is None:
        return absent
    if not images.features:
        return missing("No run has weights yet:", code("rob train-student"), "writes them at its end.")
    return shown(images)


def _versions(runs: Sequence[Run], device: torch.device) -> Markup:
    of_runs = {run.name: run.settings.get("versions") or {} for run in runs}
    here = versions(*PACKAGES)
    names = list(dict.fromkeys([*here, *(name for found in of_runs.values() for name in found)]))
    rows = [[name, *(found.get(name) for found in of_runs.values()), here.get(name)] for name in names]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores; GPU: {gpu}"
    prints = [
        [run.name, str(run.settings.get("data_fingerprint", "–")), _one_or_more(run.settings.get("targets", "–"))]
        for run in runs
    ]
    return join(
        [
            table(("package", *of_runs, "this report"), rows),
            caption(f"This report was made on {machine}. A dash: the run did not note it."),
            table(("run", "fingerprint of its images", "targets"), prints),
        ]
    )


def _one_or_more(told: object) -> str:
    return ", ".join(map(str, told)) if isinstance(told, list) else str(told)
