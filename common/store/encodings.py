"""How targets are stored: as embeddings, as the largest prototype logits, or as all of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Annotated, Any, Literal, Self

from ..errors import MisuseError
from ..settings import Setting, check

KINDS = ("embedding", "topk", "dense")
EMBEDDING_DTYPES = ("float32", "float16", "int8")
PATCHES = "patches_"
"""What the names of the arrays of patch targets begin with, beside a view's pooled target."""
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "uint16": 2, "uint32": 4}

LADDER = (0.025, 0.04, 0.055, 0.07, 0.1)
"""Teacher temperatures at which a `topk` tail is stored: MSN's effective .025, DINO's .04 to .07, SwAV's .05
between them, and DeepCluster-v2's .1."""


@dataclass(frozen=True)
class Encoding:
    """How targets are stored.

    - ``embedding``: the L2-normalised input of the prototypes, as ``dtype``; int8 has one symmetric fp16 scale a view.
    - ``topk``: the ``k`` largest prototype logits (fp16, before temperature and centre, largest first), their ids, and
      ``tail[t]`` = log-sum-exp of all the *other* logits / ``temps[t]``, so that the tail's mass is known.
    - ``dense``: every logit as fp16, for small K.
    """

    kind: Annotated[
        str,
        Setting(
            "embedding (exact logits later), topk (smallest for large K), dense (small K).",
            choices=KINDS,
            option="--encoding",
        ),
    ] = "embedding"
    dtype: Annotated[
        str,
        Setting("Of embeddings: float32, float16 or int8.", choices=EMBEDDING_DTYPES, option="--store-dtype"),
    ] = "float16"
    k: Annotated[int, Setting("Prototypes kept a view with --encoding topk.", low=1, option="--topk")] = 64
    temps: tuple[float, ...] = LADDER

    def __post_init__(self) -> None:
        check(self)
        if not self.temps or min(self.temps) <= 0 or len(set(self.temps)) != len(self.temps):
            raise MisuseError(f"the ladder of temperatures must be distinct and positive, not {self.temps}")

    def to_dict(self) -> dict[str, Any]:
        """What the store's manifest holds: only the settings that this kind uses."""
        used = {"embedding": ("kind", "dtype"), "topk": ("kind", "k", "temps"), "dense": ("kind",)}[self.kind]
        settings = asdict(self)
        return {name: list(settings[name]) if name == "temps" else settings[name] for name in used}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        temps = tuple(settings.get("temps", LADDER))
        return cls(**{**settings, "temps": temps})

    @property
    def needs_logits(self) -> bool:
        """Whether ``codec.encode`` reads the logits (and the teacher therefore needs prototypes)."""
        return self.kind != "embedding"

    @property
    def smaller(self) -> "Encoding | None":
        """One that takes fewer bytes and was measured to teach as much (benchmarks/claims.py, rows encodings; one seed)."""
        return Encoding("embedding", "int8") if self.kind == "embedding" and self.dtype != "int8" else None

    @property
    def shuffle(self) -> Literal["noshuffle", "bitshuffle"]:
        """What Blosc should do to the arrays before compressing: bit planes hide the few values that int8 steps and pooled
        features take most often (benchmarks/store.py: 210 bytes a view without, 252 with), but suit logits and ids.
        """
        return "noshuffle" if self.kind == "embedding" else "bitshuffle"

    def layout(self, dim: int, num_prototypes: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored array name -> (shape of one view's entry, name of the dtype)."""
        if self.kind == "embedding":
            arrays = {"embedding": ((dim,), self.dtype)}
            return arrays | {"scale": ((), "float16")} if self.dtype == "int8" else arrays
        if self.kind == "dense":
            return {"logits": ((num_prototypes,), "float16")}
        kept = min(self.k, num_prototypes)
        id_dtype = "uint16" if num_prototypes <= 1 << 16 else "uint32"
        return {
            "ids": ((kept,), id_dtype),
            "logits": ((kept,), "float16"),
            "tail": ((len(self.temps),), "float32"),
        }

    def bytes_per_view(self, dim: int, num_prototypes: int) -> int:
        """Bytes of one view before compression."""
        layout = self.layout(dim, num_prototypes)
        return sum(prod(shape) * ITEM_BYTES[dtype] for shape, dtype in layout.values())


def check_temperature(ladder: tuple[float, ...], temp: float, option: str = "encoding") -> None:
    """MisuseError where ``temp`` is outside of a `topk` store's ladder, and the tail's mass would be a guess. ``option`` is what
    chose to store the largest logits."""
    if not min(ladder) * 0.999 <= temp <= max(ladder) * 1.001:
        raise MisuseError(
            f"teacher temperature {temp:g} is outside of the store's ladder {min(ladder):g} to {max(ladder):g}: "
            f"take one within, or cache the targets again with `{option}` embedding, which serves any"
        )
