"""What a cached target is made of: a teacher's embedding or its prototype logits <-> the arrays of the store.

Shapes: R rows (images), V cached views, D embedding dimensions, K prototypes, k kept prototypes, T ladder temperatures.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import FailureError, MisuseError

KINDS = ("embedding", "topk", "dense")
EMBEDDING_DTYPES = ("float32", "float16", "int8")

LADDER = (0.025, 0.04, 0.055, 0.07, 0.1)
"""Teacher temperatures at which a `topk` tail is stored: MSN's effective .025, DINO's .04 to .07, and SwAV's .1."""


@dataclass(frozen=True)
class Encoding:
    """How targets are stored.

    - ``embedding``: the L2-normalised input of the prototypes, as ``dtype``; int8 has one symmetric fp16 scale a view.
    - ``topk``: the ``k`` largest prototype logits (fp16, before temperature and centre, largest first), their ids, and
      ``tail[t]`` = log-sum-exp of all the *other* logits / ``temps[t]``, so that the tail's mass is known.
    - ``dense``: every logit as fp16, for small K.
    """

    kind: str
    dtype: str = "float16"
    k: int = 64
    temps: tuple[float, ...] = LADDER

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MisuseError(f"unknown encoding {self.kind!r}: known are {', '.join(KINDS)}")
        if self.dtype not in EMBEDDING_DTYPES:
            known = ", ".join(EMBEDDING_DTYPES)
            raise MisuseError(f"an embedding cannot be stored as {self.dtype!r}: known are {known}")
        if self.k < 1:
            raise MisuseError(f"topk needs at least 1 prototype a view, not k={self.k}")
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
        """Whether `encode` reads the logits (and the teacher therefore needs prototypes)."""
        return self.kind != "embedding"

    @property
    def shuffle(self) -> Literal["noshuffle", "bitshuffle"]:
        """What Blosc should do to the arrays before compressing: bit planes hide the few values that int8 steps and pooled
        features take most often (benchmarks/store.py: 210 bytes a view without, 252 with), but suit logits and ids.
        """
        return "noshuffle" if self.kind == "embedding" else "bitshuffle"

    def layout(self, dim: int, num_prototypes: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Stored array name -> (shape of one view's entry, dtype)."""
        if self.kind == "embedding":
            arrays = {"embedding": ((dim,), np.dtype(self.dtype))}
            return arrays | {"scale": ((), np.dtype("float16"))} if self.dtype == "int8" else arrays
        if self.kind == "dense":
            return {"logits": ((num_prototypes,), np.dtype("float16"))}
        kept = min(self.k, num_prototypes)
        id_dtype = np.dtype("uint16" if num_prototypes <= 1 << 16 else "uint32")
        return {
            "ids": ((kept,), id_dtype),
            "logits": ((kept,), np.dtype("float16")),
            "tail": ((len(self.temps),), np.dtype("float32")),
        }

    def bytes_per_view(self, dim: int, num_prototypes: int) -> int:
        """Bytes of one view before compression."""
        layout = self.layout(dim, num_prototypes)
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values())

    def encode(
        self, embedding: Tensor | np.ndarray | None, logits: Tensor | np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Embedding (..., D) and raw logits (..., K), float32 on any device -> the arrays to store, see `layout`.

        Only what the kind stores is read; the other may be None. Raises FailureError when a value is NaN, infinite, or
        too large for what stores it.
        """
        values = torch.as_tensor(logits if self.needs_logits else embedding).detach().float()
        if self.kind == "embedding":
            arrays = self._encode_embedding(values)
        else:
            arrays = {"logits": values.half()} if self.kind == "dense" else self._encode_topk(values)
        if not all(torch.isfinite(stored).all() for name, stored in arrays.items() if name != "tail"):
            raise FailureError(
                f"the teacher's output is NaN, infinite, or too large for the {self.kind} encoding: check its weights, "
                "its precision and its input normalisation"
            )
        layout = self.layout(values.shape[-1], values.shape[-1])
        return {name: stored.cpu().numpy().astype(layout[name][1], copy=False) for name, stored in arrays.items()}

    def decode(self, arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
        """Stored arrays -> what the loss reads, on the arrays' own device: floats as float32, ids as int64.

        ``embedding`` gives {embedding}, ``topk`` {ids, logits, tail}, ``dense`` {logits}.
        """
        tensors = {name: torch.as_tensor(values) for name, values in arrays.items()}
        decoded = {name: _widen(values) for name, values in tensors.items() if name != "scale"}
        if "scale" in tensors:
            decoded["embedding"] *= tensors["scale"].float()[..., None]
        return decoded

    def _encode_embedding(self, embedding: Tensor) -> dict[str, Tensor]:
        if self.dtype != "int8":
            return {"embedding": embedding.to(getattr(torch, self.dtype))}
        # Quantised by the scale as stored, so that rounding the scale to fp16 costs nothing.
        scale = (embedding.abs().amax(-1) / 127).half()
        steps = torch.nan_to_num(embedding / scale.float()[..., None]).round().clamp(-127, 127)
        return {"embedding": steps.to(torch.int8), "scale": scale}

    def _encode_topk(self, logits: Tensor) -> dict[str, Tensor]:
        kept, ids = logits.topk(min(self.k, logits.shape[-1]), dim=-1, sorted=True)
        rest = logits.scatter(-1, ids, -torch.inf)  # a whole row of -inf when K <= k: the tail is then -inf
        tail = torch.stack([torch.logsumexp(rest / temp, dim=-1) for temp in self.temps], dim=-1)
        return {"ids": ids, "logits": kept.half(), "tail": tail}


def _widen(values: Tensor) -> Tensor:
    """float32 for stored floats and int8 steps, int64 for ids."""
    return values.to(torch.int64 if values.dtype in (torch.uint16, torch.uint32) else torch.float32)


def check_temperature(ladder: tuple[float, ...], temp: float) -> None:
    """MisuseError where ``temp`` is outside of a `topk` store's ladder, and the tail's mass would be a guess."""
    if not min(ladder) * 0.999 <= temp <= max(ladder) * 1.001:
        raise MisuseError(
            f"teacher temperature {temp:g} is outside of the store's ladder {min(ladder):g} to {max(ladder):g}: "
            "take one within, or cache the targets again with --encoding embedding, which serves any"
        )
