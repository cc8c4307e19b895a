"""Runs of ``claims.py`` as rows of a table: over seeds, and against each other on the same test images."""

from collections.abc import Mapping, Sequence
from math import comb
from statistics import mean, stdev
from typing import Any

import numpy as np

from rob.benchmarks.claims_rows import Row

MEASURES = ("knn_top1", "linear_top1")
AVERAGED = ("average_knn_top1", "average_linear_top1")
MEANS = ("train_seconds", "images_seen")


def over_seeds(runs: Sequence[Mapping[str, Any]], student: str, row: Row) -> dict[str, Any] | None:
    """The table's line of ``row``, of those of ``runs`` that are its own; None: there are none."""
    found = of(runs, student, row.name)
    if not found:
        return None
    line: dict[str, Any] = {"student": student, "setting": row.title, "seeds": len(found)}
    for measure in (*MEASURES, *AVERAGED):
        values = [run[measure] for run in found.values() if measure in run]
        line |= {measure: mean(values) if values else None} | deviation(measure, values)
    for name in MEANS:
        line[name] = mean(run[name] for run in found.values()) if all(name in run for run in found.values()) else None
    others = of(runs, student, row.against) if row.against else {}
    shared = sorted(found.keys() & others.keys())
    if not shared:
        return line | {"points": None, "p": None, "against": row.against or None}
    points = [found[seed]["knn_top1"] - others[seed]["knn_top1"] for seed in shared]
    pairs = [(bits(found[seed]["knn_hits"]), bits(others[seed]["knn_hits"])) for seed in shared]
    # Seeds share their test images: pooled, these would count several times. So p is that of the least certain seed.
    p = max(mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in pairs)
    return line | {"points": mean(points)} | deviation("points", points) | {"p": p, "against": row.against}


def of(runs: Sequence[Mapping[str, Any]], student: str, row: str) -> dict[int, Mapping[str, Any]]:
    """By seed."""
    return {run["seed"]: run for run in runs if (run["student"], run["row"]) == (student, row)}


def deviation(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_deviation": stdev(values)} if len(values) > 1 else {}


def bits(digits: str) -> np.ndarray:
    """(N,) bool, N rounded up to whole bytes."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).astype(bool)


def mcnemar(first_alone: int, second_alone: int) -> float:
    """Two-sided exact p: that of the images which one of two classifiers alone gets right, so few or fewer are one's, where each
    is as likely to be the other's (McNemar 1947)."""
    n, fewer = first_alone + second_alone, min(first_alone, second_alone)
    tail = sum(comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)
