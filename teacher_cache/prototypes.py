"""Prototypes for teachers that publish none: balanced mini-batch spherical k-means on cached embeddings.

Each batch is balanced by Sinkhorn-Knopp (SwAV, arXiv 2006.09882, eq. 3 to 5), so that every prototype gets the same
share of it; each embedding then goes to the prototype with its largest share, and a prototype moves to the direction of
the decaying sum of what it was given. Moving by the soft shares instead, as SwAV's loss does, lets prototypes drift
together where embeddings are dense.

One number sets the scale of both temperatures: the spread, the standard deviation of the cosine between embeddings of
different images, which is several times larger for a trained projection than for the pooled features of a ReLU network.
``benchmarks/notes_prototypes.md`` has what was measured.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import MisuseError

CPU = torch.device("cpu")

ReadRows = Callable[[int, int], np.ndarray | Tensor]
"""``read(start, stop)``: the embeddings of rows start..stop-1, (n, D) or (n, V, D)."""

EPSILON_OF_SPREAD = 0.25
"""Softness of the balancing over the spread; from a half to a sixteenth it hardly matters."""
TEMP_OF_SPREAD = 0.5
"""Teacher temperature over the spread: half of this is close to a label, twice is close to nothing."""

EMBEDDINGS_EACH = 4
"""Least number of embeddings for each prototype: with fewer, prototypes are images."""

PASS_EMBEDDINGS_EACH = 256
"""Most embeddings for each prototype that a pass reads: k-means gains nothing from more (faiss's rule)."""

BATCH_ELEMENTS = 1 << 25
"""Elements of the largest matrix held, batch x K or batch x D: 128 MiB of float32."""

BLOCK_ROWS = 16
"""Rows read in one piece. A batch is many blocks from all over the store: neighbouring rows may be of one class (``rob pack
--keep-order``), and a batch of one class must not be spread over the prototypes of all."""

WINDOW = 10
"""Batches that a prototype's decaying sum reaches back over, or as many as a pass has: one batch makes plain Lloyd steps."""

SCALE_SAMPLE = 1024
"""Embeddings whose cosines with each other measure the spread."""


@dataclass(frozen=True)
class PrototypeConfig:
    """How to fit."""

    num: int
    """K, at least 2."""
    epochs: int = 5
    """Passes over the embeddings."""
    seed: int = 0


@dataclass(frozen=True)
class FittedPrototypes:
    """What a fit found, and its figures over one more pass."""

    prototypes: Tensor
    """(K, D) float32 unit rows."""
    teacher_temp: float
    """Temperature for a teacher's softmax over them: half the spread."""
    used: float
    """Share of the prototypes that are the nearest one of some embedding."""
    balance: float
    """Entropy of how the embeddings share out over their nearest prototypes, over log K; 1 is a perfectly even use."""
    cohesion: float
    """Mean cosine of an embedding with its nearest prototype."""


def fit_prototypes(
    read: ReadRows,
    num_rows: int,
    config: PrototypeConfig,
    device: torch.device = CPU,
    progress: Callable[[int, int], None] = lambda done, total: None,
    map_in_order: Callable[..., Iterable[Any]] = map,
) -> FittedPrototypes:
    """Fit ``config.num`` prototypes, on ``device``, to the embeddings that ``read`` gives, a bounded number in memory at a time.
    What is found is on the CPU.

    The same rows and configuration give the same prototypes (on a GPU, which adds up in any order, to rounding). ``progress``
    is called with (batches done, all). ``map_in_order`` may be a pool's, where reading takes long. Raises ``MisuseError`` for
    more prototypes than the embeddings bear.
    """
    views, dim = _unit_rows(read(0, 1)).shape
    refuse_unsuitable(config.num, num_rows * views)
    generator = np.random.Generator(np.random.Philox(config.seed))
    blocks = np.arange(0, num_rows, BLOCK_ROWS)
    blocks_a_pass = min(len(blocks), -(-PASS_EMBEDDINGS_EACH * config.num // (BLOCK_ROWS * views)))
    blocks_a_batch = max(1, BATCH_ELEMENTS // max(config.num, dim) // (BLOCK_ROWS * views))
    num_batches = -(-blocks_a_pass // blocks_a_batch)

    batches, read_before = (config.epochs + 2) * num_batches, 0

    def one_pass() -> Iterator[Tensor]:
        """Batches (B, D) that cover the embeddings, or a fresh part of them, in random order."""
        nonlocal read_before
        for batch in np.array_split(generator.permutation(blocks)[:blocks_a_pass], num_batches):
            progress(read_before, batches)
            read_before += 1
            stops = np.minimum(batch + BLOCK_ROWS, num_rows)
            rows = map(_unit_rows, map_in_order(read, batch.tolist(), stops.tolist()))
            yield torch.cat(list(rows)).to(device)

    wanted = max(config.num, SCALE_SAMPLE)
    from_each = 2 * -(-wanted // num_batches)  # twice, because the last block can be short
    sample = torch.cat([batch[generator.permutation(len(batch))[:from_each]] for batch in one_pass()])
    sample = sample[generator.permutation(len(sample))]
    prototypes, spread = sample[: config.num], _spread(sample[:SCALE_SAMPLE])
    sums, window = torch.zeros(config.num, dim, device=device), min(num_batches, WINDOW)
    for _ in range(config.epochs):
        for embeddings in one_pass():
            shares = balanced_assignment(embeddings @ prototypes.T, EPSILON_OF_SPREAD * spread)
            sums.mul_(1 - 1 / window).index_add_(0, shares.argmax(dim=1), embeddings)
            prototypes = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), prototypes)
    fitted = _with_figures(prototypes, TEMP_OF_SPREAD * spread, one_pass())
    progress(batches, batches)
    return fitted


def refuse_unsuitable(num: int, num_embeddings: int) -> None:
    """``MisuseError`` unless ``num`` prototypes can be fitted to so many embeddings, images times views."""
    most = num_embeddings // EMBEDDINGS_EACH
    if 2 <= num <= most:
        return
    remedy = (
        f"give from 2 to {most}, one for every {EMBEDDINGS_EACH} at most" if most >= 2 else "they are too few for any"
    )
    raise MisuseError(f"`prototypes` {num} does not suit {num_embeddings} embeddings: {remedy}")


def balanced_assignment(similarity: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp: shares (B, K) of embeddings in prototypes, rows 1/B, columns near 1/K, from similarities (B, K).

    Starts from the softmax of each row, which unlike SwAV's plain exponential can't underflow, then balances columns
    and rows.
    """
    shares = similarity.div(epsilon).softmax(dim=1)
    batch, num = shares.shape
    for _ in range(iterations):
        shares.div_(shares.sum(dim=0).clamp_min_(torch.finfo(shares.dtype).tiny)).div_(num)
        shares.div_(shares.sum(dim=1, keepdim=True)).div_(batch)
    return shares


def _unit_rows(embeddings: np.ndarray | Tensor) -> Tensor:
    rows = torch.as_tensor(embeddings)
    return F.normalize(rows.reshape(-1, rows.shape[-1]).float(), dim=1)


def _spread(embeddings: Tensor) -> float:
    """Standard deviation of the cosines between different rows of ``embeddings`` (n, D)."""
    cosines = embeddings @ embeddings.T
    return cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)].std().clamp_min(1e-3).item()


def _with_figures(prototypes: Tensor, teacher_temp: float, batches: Iterable[Tensor]) -> FittedPrototypes:
    counts, total = torch.zeros(len(prototypes), dtype=torch.float64), 0.0
    for embeddings in batches:
        cosines, nearest = (embeddings @ prototypes.T).max(dim=1)
        counts += torch.bincount(nearest, minlength=len(prototypes)).cpu()
        total += cosines.sum().item()
    return FittedPrototypes(
        prototypes=prototypes.cpu(),
        teacher_temp=teacher_temp,
        used=(counts > 0).double().mean().item(),
        balance=(torch.special.entr(counts / counts.sum()).sum() / np.log(len(prototypes))).item(),
        cohesion=total / counts.sum().item(),
    )
