"""How much of what an iBOT teacher says of patches survives storing: bytes a view, total variation, and what a probe finds.

    python -m rob.benchmarks.patch_prototypes --train masks/images/train --test masks/images/test --teacher test_vit \\
        --checkpoint teacher.safetensors --size 112

Each encoding is what ``rob cache-teacher --patches prototypes`` or ``embedding`` would store of a whole image, decoded again as
the loss reads it. The loss of a target ``q`` depends on it by its mean prototype alone, ``q @ prototypes``: that is what the
probe, the one of ``rob eval segment``, is given. The cosine is of it, too, without what all patches have in common. Total
variation is half the sum of ``|q' - q|``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from rob.benchmarks.patches import CPU, PatchesBench, Probe, work
from rob.benchmarks.report import Report
from rob.common.errors import MisuseError
from rob.common.exported import described_in, read_metadata
from rob.common.options import command
from rob.common.patches import PatchTargets
from rob.common.settings import Setting
from rob.common.store.codec import decode, decode_patches, encode, encode_patches
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PATCH_LADDER, PatchEncoding
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.kernels.target import TopKTarget
from rob.student_train.kernels.topk import topk_means, topk_probabilities
from rob.teacher_cache.config import TeacherConfig
from rob.teacher_cache.teachers import load_teacher

KEPT = (32, 16, 8, 4)
IMAGES_AT_ONCE = 8
"""Of which all logits are held: 51 MB at 14 x 14 patches and 8192 prototypes."""


@dataclass(frozen=True)
class PatchPrototypesBench(PatchesBench):
    given: Annotated[
        str,
        Setting(
            "What of a target the probe is given. means: the mean prototype under it, which is all that reaches the loss. "
            "logits: its log-probabilities at .07, which is all that is stored.",
            choices=("means", "logits"),
        ),
    ] = "means"


class Told(NamedTuple):
    """What the targets of n images tell the loss, P positions each."""

    probabilities: Tensor
    """(n, P, K)."""
    mean: Tensor
    """(n, P, D), the mean prototype under them."""


@dataclass(frozen=True)
class Reading:
    """How a loss reads targets: at which temperature, and behind which centre (K,)."""

    prototypes: Tensor
    temp: float
    centre: Tensor | None

    def logits(self, logits: Tensor) -> Told:
        """Of all logits (n, P, K)."""
        shifted = logits if self.centre is None else logits - self.centre
        probabilities = (shifted / self.temp).softmax(-1)
        return Told(probabilities, probabilities @ self.prototypes)

    def kept(self, arrays: dict[str, Tensor]) -> Told:
        """Of the largest, and the tail that stands for the others."""
        target = TopKTarget(arrays["ids"], arrays["logits"], arrays["tail"], PATCH_LADDER, len(self.prototypes))
        at_ids, elsewhere = topk_probabilities(target, self.temp, self.centre)
        spread = elsewhere[..., None].expand(-1, -1, len(self.prototypes))
        return Told(spread.scatter(-1, target.ids, at_ids), topk_means(target.ids, at_ids, elsewhere, self.prototypes))


def run(config: PatchPrototypesBench) -> Report:
    if config.checkpoint is None:
        raise MisuseError("`checkpoint` is missing: the teacher must have prototypes of its own for patches, as iBOT's")
    teacher = load_teacher(TeacherConfig(config.teacher, config.checkpoint))
    prototypes = teacher.patch_prototypes
    if prototypes is None or teacher.head is None:
        raise MisuseError(f"{config.checkpoint} has no prototypes of patches: take the file of an iBOT teacher")
    probe = Probe(config)
    maps = probe.maps(FrozenNetwork.teacher(teacher, config.size, CPU))
    width, side = maps[0].shape[1:3]
    every = PatchEncoding("prototypes", side, teacher.dim, width, len(prototypes), len(prototypes))
    targets = PatchTargets(every, teacher.head, prototypes, {}, CPU)
    embedded = [torch.cat([targets.rows(part) for part in both.split(IMAGES_AT_ONCE)]) for both in maps]
    told = {"prototypes": len(prototypes), "bottleneck": teacher.dim, "teacher_temp": teacher.teacher_temp}
    told |= {"given": config.given}
    if config.given == "logits":
        rows = [*measured(Reading(prototypes, PATCH_LADDER[-1], None), every, embedded, probe, logits=True)]
        return Report.of("patch_prototypes", CPU, work(config, probe) | told, rows, {})
    rows: list[dict[str, Any]] = []
    info = described_in(read_metadata(config.checkpoint), config.checkpoint)
    if info is not None:
        untrained = probe.maps(FrozenNetwork.untrained(info, 0, CPU, config.size))
        rows.append({"stored": "tokens of random weights", "miou": probe.miou(untrained)})
    rows.append({"stored": "tokens, float32", "bytes_per_view": 4 * maps[0][0].numel(), "miou": probe.miou(maps)})
    for dtype in ("float32", "float16", "int8"):
        stored = [as_embedding(dtype, both) for both in embedded]
        rows.append(
            {
                "stored": f"embedding, {dtype}",
                "bytes_per_view": side * side * Encoding("embedding", dtype=dtype).bytes_per_view(teacher.dim, 0),
                "cosine": F.cosine_similarity(stored[1], embedded[1], dim=-1).mean().item(),
                "miou": probe.miou(as_maps(stored)),
            }
        )
    for centre in (None, teacher.patch_centre):
        for temp in PATCH_LADDER if centre is None else PATCH_LADDER[:1]:
            reading = Reading(prototypes, temp, centre)
            rows += measured(reading, every, embedded, probe)
    return Report.of("patch_prototypes", CPU, work(config, probe) | told, rows, {})


def as_embedding(dtype: str, rows: Tensor) -> Tensor:
    """Rows (..., D) as they come back."""
    encoding = Encoding("embedding", dtype=dtype)
    return decode(encoding, encode(encoding, rows))["embedding"]


def as_maps(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows (N, P, D) of the images to train on and to test on as maps of deviation 1: the means of soft targets differ by less
    than the epsilon of the probe's BatchNorm."""
    side = isqrt(rows[0].shape[1])
    deviation = rows[0].std((0, 1)).mean()
    return [(both / deviation).mT.unflatten(2, (side, side)) for both in rows]


def measured(
    reading: Reading, every: PatchEncoding, embedded: list[Tensor], probe: Probe, logits: bool = False
) -> Iterator[dict[str, Any]]:
    """A row for all logits, for the embedding in int8, and for the largest logits, as ``reading`` has them. Of ``logits``, the
    log-probabilities take the mean's place."""
    kinds = [("all logits, float32", 4 * every.positions * every.num_prototypes, None)]
    kinds += [("embedding, int8", replace(every, kind="embedding").bytes_per_view, replace(every, kind="embedding"))]
    kinds += [(f"{k} largest", replace(every, k=k).bytes_per_view, replace(every, k=k)) for k in KEPT]
    true: list[Tensor] = []
    for name, bytes_, encoding in kinds:
        means, distances = [], []
        for both in embedded:
            parts = []
            for rows in both.split(IMAGES_AT_ONCE):
                similarities = rows @ reading.prototypes.T
                full = reading.logits(similarities)
                found = full if encoding is None else told_by(encoding, rows, similarities, reading)
                parts.append(found.probabilities.clamp(min=1e-30).log() if logits else found.mean)
                distances.append((found.probabilities - full.probabilities).abs().sum(-1).flatten() / 2)
            means.append(torch.cat(parts))
        true = true or means  # all logits come first
        usual = true[1].mean((0, 1))
        yield {
            "stored": name,
            "temperature": reading.temp,
            "centred": reading.centre is not None,
            "bytes_per_view": bytes_,
            "total_variation": torch.cat(distances).mean().item(),
            "cosine": F.cosine_similarity(means[1] - usual, true[1] - usual, dim=-1).mean().item(),
            "miou": probe.miou(as_maps(means)),
        }


def told_by(encoding: PatchEncoding, rows: Tensor, logits: Tensor, reading: Reading) -> Told:
    """Of rows (n, P, D) and their logits (n, P, K), behind ``encoding``."""
    arrays = decode_patches(encoding, encode_patches(encoding, rows, logits))
    if encoding.kind == "embedding":
        return reading.logits(arrays["embedding"] @ reading.prototypes.T)
    return reading.kept(arrays)


if __name__ == "__main__":

    def patch_prototypes(
        config: PatchPrototypesBench, out: Annotated[Path | None, Setting("JSON to write.")] = None
    ) -> None:
        """Bytes, total variation and mean IoU of every encoding of an iBOT teacher's patches."""
        report = run(config)
        report.show()
        report.write(out)

    typer.run(command(patch_prototypes))
