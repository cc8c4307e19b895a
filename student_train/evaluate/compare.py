"""Several runs side by side: what each student scores, and what it costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ...common.errors import MisuseError, shortened
from ...common.files import replacing
from ...common.timing import median_ms
from ...common.weights import hash_weights
from ..checkpoint import load_student
from ..export.exported_file import ExportedFile, read_exports
from ..run_folder import read_log
from ..students import num_macs, num_parameters
from .results import of_weights, read_results


@dataclass(frozen=True)
class RunSummary:
    """One run. ``scores`` are percent by task (accuracy, AP of detection, or mean IoU); costs are of one image.

    ``cuda_ms`` is None without CUDA, ``train_images_per_second`` (median over the log) None without a log.
    """

    run: str
    student: str
    weights: str
    """What ``hash_weights`` says of the student."""
    image_size: int
    parameters: int
    macs: int
    cpu_ms: float
    cuda_ms: float | None
    train_images_per_second: float | None
    scores: Mapping[str, float]
    tested_on: Mapping[str, str]
    """Task -> what identifies its test images, where the result says it."""
    exports: Mapping[str, ExportedFile]
    """What rob export made of these weights, by the name of the file."""
    left_out: Sequence[str]
    """Tasks whose results are of other weights."""


def summarise(run: Path) -> RunSummary:
    """Reads a run folder and measures its student. MisuseError: no student there, or a result that is no JSON."""
    backbone, info = load_student(run)
    weights = hash_weights(backbone.state_dict())
    scores: dict[str, float] = {}
    tested_on: dict[str, str] = {}
    results = read_results(run)
    of_student = of_weights(results, weights)
    for task, result in of_student.items():
        for name, score in headline(task, result).items():
            scores[name] = score
            tested_on[name] = str(result.get("test_fingerprint") or result.get("test"))
    return RunSummary(
        run=str(run),
        student=info.name,
        weights=weights,
        image_size=info.image_size,
        parameters=num_parameters(backbone),
        macs=num_macs(backbone, info.image_size),
        cpu_ms=latency_ms(backbone, info.image_size, torch.device("cpu")),
        cuda_ms=latency_ms(backbone, info.image_size, torch.device("cuda")) if torch.cuda.is_available() else None,
        train_images_per_second=training_speed(run),
        scores=scores,
        tested_on=tested_on,
        exports={name: entry for name, entry in read_exports(run).items() if entry.weights == weights},
        left_out=[task for task in results if task not in of_student],
    )


def headline(task: str, result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in percent that stand for a result: top-1, a mean for each number of labels, mean IoU, or box and mask AP
    (where there was anything to find)."""
    if "top1" in result:
        return {task: result["top1"]}
    if "results" in result:
        return {f"{task} {entry['labels']}": entry["mean"] for entry in result["results"]}
    if "miou" in result:
        return {f"{task} mIoU": result["miou"]}
    found = {f"{task} {kind} AP": (result.get(kind) or {}).get("ap") for kind in ("box", "mask")}
    return {name: ap for name, ap in found.items() if ap is not None}


@torch.no_grad()
def latency_ms(backbone: nn.Module, size: int, device: torch.device) -> float:
    """Median milliseconds of a forward pass of one (1, 3, size, size) float32 image, on one thread of the CPU or on CUDA."""
    backbone.eval().to(device)
    image = torch.zeros(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return median_ms(lambda: (backbone(image), wait()))
    finally:
        torch.set_num_threads(threads)
        backbone.cpu()


def training_speed(run: Path) -> float | None:
    """Median images/s over the run's ``metrics.jsonl``; None where there is none."""
    speeds = [line["images_per_second"] for line in read_log(run)]
    return median(speeds) if speeds else None


def names_of(runs: Sequence[str]) -> list[str]:
    """As short as tells the runs apart: the name of the folder, else the path without the folders that all of them are in."""
    paths = [Path(run).parts for run in runs]
    last = [parts[-1] if parts else "." for parts in paths]
    if len(set(last)) == len(last):
        return last
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return ["/".join(parts[min(shared, len(parts) - 1) :]) for parts in paths]


def all_tasks(summaries: Sequence[RunSummary]) -> list[str]:
    """A task and its controls side by side, and what else is of one task in the order of its first appearance."""
    found = dict.fromkeys(task for summary in summaries for task in summary.scores)
    return sorted(found, key=lambda task: task.partition(" ")[0])


def write_comparison(summaries: Sequence[RunSummary], out: Path) -> None:
    """``out`` as a PNG, scores against parameters, MACs, latency and training speed; the numbers beside it as ``.json``.

    MisuseError: no run has a result yet. FailureError: a file cannot be written.
    """
    from .compare_plot import compare_plot

    tasks = all_tasks(summaries)
    if not tasks:
        raise MisuseError("none of these runs has been evaluated: run rob eval knn RUN ... first")
    costs = {
        "parameters, M": [s.parameters / 1e6 for s in summaries],
        "MACs, M": [s.macs / 1e6 for s in summaries],
        "CPU latency, ms (one thread)": [s.cpu_ms for s in summaries],
        "CUDA latency, ms": [s.cuda_ms for s in summaries],
        "training images/s": [s.train_images_per_second for s in summaries],
    }
    names = [shortened(name, 40, tail=True) for name in names_of([s.run for s in summaries])]
    names = [f"{name} ({s.student}, {s.image_size} px)" for name, s in zip(names, summaries, strict=True)]
    figure = compare_plot(names, costs, {task: [s.scores.get(task) for s in summaries] for task in tasks})
    with replacing(out) as file:
        figure.savefig(file, format="png", dpi=110)
    with replacing(out.with_suffix(".json")) as file:
        file.write((json.dumps([asdict(summary) for summary in summaries], indent=2) + "\n").encode())
