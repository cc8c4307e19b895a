"""How patch tokens are stored beside a view's pooled target: what may be asked for, and the arrays that it becomes.

Shapes: P = grid x grid positions of a view, row by row from the top left; C numbers a position.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Annotated, Any, Self

from ..errors import MisuseError
from ..settings import Setting, check
from .encodings import ITEM_BYTES, PATCHES, Encoding

KINDS = ("grid", "prototypes", "embedding")
AUTO, NONE = "auto", "none"
USUAL_GRID, USUAL_DIM, USUAL_K = 7, 128, 8
PATCH_LADDER = (0.04, 0.07)
"""Temperatures of a patch's tail: iBOT's warm-up begins at the one and ends at the other."""


@dataclass(frozen=True)
class PatchChoice:
    """Which patch targets to cache. What is None is as ``resolve_patches`` has it."""

    patches: Annotated[
        str,
        Setting(
            "Patch targets too, for short runs, detection and segmentation. grid: the teacher's last patch tokens, averaged to "
            "--patch-grid, cut to --patch-dim by a PCA, int8; for --objective patch. prototypes, embedding: a teacher's own "
            "prototypes of every patch, the largest logits or what goes into them; for ibot. none: no patches. auto: grid beside "
            "embeddings without prototypes, where the teacher's map has 7 x 7 positions or more and they take up to 1 GB; with "
            "--preset, none. Mind the plan's bytes.",
            choices=(AUTO, NONE, *KINDS),
        ),
    ] = AUTO
    patch_grid: Annotated[
        int | None,
        Setting("Positions a side of --patches grid; default 7, or the teacher's own where those are fewer.", low=1),
    ] = None
    patch_dim: Annotated[
        int | None,
        Setting(
            "Principal components kept of a patch token with --patches grid; default 128, or all where there are fewer; 0 all.",
            low=0,
        ),
    ] = None
    patch_topk: Annotated[
        int | None, Setting("Prototypes kept a patch with --patches prototypes; default 8.", low=1)
    ] = None

    def __post_init__(self) -> None:
        check(self)
        for name, kind in {"patch_grid": "grid", "patch_dim": "grid", "patch_topk": "prototypes"}.items():
            if vars(self)[name] is not None and self.patches != kind:
                raise MisuseError(
                    f"`{name}` is for `patches` {kind}, and it is {self.patches}: leave `{name}` out, or give `patches` {kind}"
                )


@dataclass(frozen=True)
class PatchEncoding:
    """How the patch targets of a view are stored: ``grid`` x ``grid`` positions of ``dim`` numbers, of tokens of ``width``.

    - ``grid``: patch tokens, averaged over each position and reduced by a PCA where they were wider; int8 with a scale a token.
    - ``embedding``: the unit input of the teacher's patch prototypes, int8 with a scale a token.
    - ``prototypes``: the ``k`` largest of ``num_prototypes`` logits a patch, and the rest's log-sum-exp at ``PATCH_LADDER``.
    """

    kind: str
    grid: int
    dim: int
    width: int
    num_prototypes: int = 0
    k: int = USUAL_K

    @property
    def positions(self) -> int:
        return self.grid * self.grid

    @property
    def reduced(self) -> bool:
        """Whether a PCA has cut the tokens."""
        return self.kind == "grid" and self.dim < self.width

    @property
    def of_one(self) -> Encoding:
        """How a single position is stored."""
        if self.kind == "prototypes":
            return Encoding("topk", k=self.k, temps=PATCH_LADDER)
        return Encoding("embedding", dtype="int8")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.kind == "prototypes" else {n: v for n, v in values.items() if n != "k"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. ValueError, TypeError: no such encoding."""
        found = cls(**values)
        numbers = (found.grid, found.dim, found.width, found.k)
        if found.kind not in KINDS or not all(type(n) is int and 1 <= n <= 1 << 20 for n in numbers):
            raise ValueError(f"no patch targets are {dict(values)}")
        return found

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored array name -> (shape of one view's entry, name of the dtype)."""
        of_one = self.of_one.layout(self.dim, self.num_prototypes)
        return {PATCHES + name: ((self.positions, *shape), dtype) for name, (shape, dtype) in of_one.items()}

    @property
    def bytes_per_view(self) -> int:
        """Before compression."""
        return sum(prod(shape) * ITEM_BYTES[dtype] for shape, dtype in self.layout().values())


def resolve_patches(
    choice: PatchChoice, teacher: str, side: int, width: int, dim: int, num_prototypes: int
) -> PatchEncoding | None:
    """The encoding that is ``choice`` of a ``teacher`` whose map has ``side`` x ``side`` positions of ``width`` numbers, and
    whose head gives ``dim`` of them, for ``num_prototypes`` patch prototypes. None: no patches are wanted.

    MisuseError: a larger grid or more components than the teacher has, or no prototypes.
    """
    assert choice.patches != AUTO, "that goes by more than the teacher"
    if choice.patches == NONE:
        return None
    if choice.patches != "grid":
        if not num_prototypes:
            raise MisuseError(
                f"`patches` {choice.patches} is for a teacher with prototypes of its own, as iBOT's, and {teacher} has none: use "
                "`patches` grid"
            )
        kept = min(choice.patch_topk or USUAL_K, num_prototypes)
        return PatchEncoding(choice.patches, side, dim, width, num_prototypes, kept)
    grid = min(USUAL_GRID, side) if choice.patch_grid is None else choice.patch_grid
    if grid > side:
        raise MisuseError(
            f"`patch_grid` {grid} is more than the {side} x {side} patches that {teacher} makes of a view: use {side} or fewer, "
            "or a larger `view_size`"
        )
    wanted = min(USUAL_DIM, width) if choice.patch_dim is None else choice.patch_dim
    if wanted > width:
        raise MisuseError(
            f"`patch_dim` {wanted} is more than the {width} numbers of a token of {teacher}: use 0 for all"
        )
    return PatchEncoding("grid", grid, wanted or width, width)
