"""A frozen network and the pixels it expects: a student, a teacher, or the pixels themselves. What every evaluation measures."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...common.errors import MisuseError, is_out_of_memory
from ...common.images.beton import Beton
from ...common.ranks import ALONE, Ranks
from ...common.tokens import TokenFeatures
from ...common.views.loader import LoaderConfig, ViewLoader, ViewSet, geometry
from ...common.views.recipes import evaluation_recipe
from ...common.weights import hash_weights
from ..checkpoint import load_student
from ..export.onnx_file import OnnxBackbone
from ..students import StudentConfig, StudentInfo, check_input_size, create_student, describe_student
from .features import FeatureKey, Features, cached_features, extract_features, flatten_pixels, labels_of
from .helpers import ask, help_out, let_go

SEES_ALL_UP_TO = 64
"""Pixels a side."""


def share_seen(size: int) -> float:
    """Of an image's shorter side, the middle part that a network of ``size`` pixels sees: all up to ``SEES_ALL_UP_TO``, else 7/8,
    as usual. It goes by the network, so that it is the same for every image that it is measured on.
    """
    return 1.0 if size <= SEES_ALL_UP_TO else 0.875


class TeacherWithBackbone(Protocol):
    """What is measured of a teacher: ``teacher_cache.teachers.Teacher`` has it, and the two stages stay apart."""

    name: str
    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooling: str | None


@dataclass(frozen=True)
class FrozenNetwork:
    """``embed`` maps (B, 3, size, size), normalised by ``mean`` and ``std``, to features (B, D). ``source`` tells its
    weights apart; ``tokens`` is what of a ViT ``embed`` gives, one of ``common.tokens.TOKENS`` (None: what it pools itself).
    Of several ``ranks`` the first ``extract``s, and the others ``help``, each on a device of its own.
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    device: torch.device
    tokens: str | None = None
    interpolation: str = "bicubic"
    ranks: Ranks = ALONE

    @classmethod
    def pixels(cls, size: int, device: torch.device) -> "FrozenNetwork":
        """Centred on mid-grey, so that their cosine says more than their brightness."""
        return cls("pixels", flatten_pixels, size, (0.5,) * 3, (0.25,) * 3, "pixels", device)

    @classmethod
    def student(cls, run_or_weights: Path, device: torch.device, size: int | None = None) -> "FrozenNetwork":
        """The trained student of a run folder or a weights file. MisuseError as ``load_student``."""
        backbone, info = load_student(run_or_weights, device)
        return cls._of(info.name, backbone, size or info.image_size, info.mean, info.std, device)

    @classmethod
    def onnx(cls, path: Path) -> "FrozenNetwork":
        """What rob export made of a student, run by onnxruntime on the CPU. MisuseError as ``OnnxBackbone.open``."""
        backbone = OnnxBackbone.open(path)
        device = torch.device("cpu")
        return cls(backbone.name, backbone, backbone.size, backbone.mean, backbone.std, backbone.source, device)

    @classmethod
    def random_student(cls, config: StudentConfig, seed: int, device: torch.device) -> "FrozenNetwork":
        """The same network before training: the floor of what training adds."""
        return cls.untrained(describe_student(config), seed, device)

    @classmethod
    def untrained(cls, info: StudentInfo, seed: int, device: torch.device, size: int | None = None) -> "FrozenNetwork":
        """The network that ``info`` describes with random weights."""
        torch.manual_seed(seed)
        backbone = create_student(info).to(device).eval()
        network = cls._of(f"random {info.name}", backbone, size or info.image_size, info.mean, info.std, device)
        # Networks that differ in strides or normalisation alone begin with the same weights.
        form = hashlib.sha256(json.dumps(info.to_dict(), sort_keys=True).encode()).hexdigest()
        return replace(network, source=f"{network.source} {form}")

    @classmethod
    def teacher(cls, teacher: TeacherWithBackbone, size: int, device: torch.device) -> "FrozenNetwork":
        """A teacher, which is on ``device``, without its head: as DINO evaluates, and as students are measured."""
        return cls._of(teacher.name, teacher.backbone, size, teacher.mean, teacher.std, device).of(teacher.pooling)

    @classmethod
    def _of(
        cls,
        name: str,
        backbone: nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> "FrozenNetwork":
        return cls(name, backbone, size, mean, std, hash_weights(backbone.state_dict()), device)

    def of(self, tokens: str | None, interpolation: str = "bicubic") -> "FrozenNetwork":
        """The same weights with other features (None: the same), of images that are resized by ``interpolation``.

        MisuseError: it is no ViT, or one of too few blocks.
        """
        if tokens is None:
            return replace(self, interpolation=interpolation)
        backbone: Any = self.embed.backbone if isinstance(self.embed, TokenFeatures) else self.embed
        embed = TokenFeatures(backbone, tokens, self.name)
        return replace(self, embed=embed, tokens=tokens, interpolation=interpolation)

    @property
    def unusual(self) -> dict[str, str]:
        """The features and the interpolation, where they are not what older results, which do not name them, have."""
        found = {"pooling": self.tokens} if self.tokens else {}
        return found if self.interpolation == "bilinear" else {**found, "interpolation": self.interpolation}

    @property
    def settings(self) -> dict[str, Any]:
        """What outcomes depend on, for a file that says what it is of."""
        return {"weights": self.source, "size": self.size, **self.unusual}

    @property
    def title(self) -> str:
        """For the head of a table."""
        seen = "the whole square" if share_seen(self.size) == 1 else "the middle 7/8"
        tokens = [self.tokens] if self.tokens else []
        return ", ".join((self.name, *tokens, f"{self.interpolation} to {self.size} px", seen))

    def features(
        self,
        path: Path,
        loader: LoaderConfig,
        keep_in: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Features:
        """Labelled features of a ``.beton``. MisuseError: an image has no label; else as ``extract``."""
        data = Beton(path)
        labels = labels_of(data)  # what is missing is said before anything is extracted
        return Features(self.extract(data, loader, keep_in, progress), labels, data.manifest.classes)

    def extract(
        self,
        data: Beton,
        loader: LoaderConfig,
        keep_in: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Features (N, D) float32 on the CPU, row i of image i; with ``keep_in`` a run folder, extracted once and kept there.

        ``progress`` is called with (images done, all). MisuseError: the network cannot take images of its size.
        """
        if isinstance(self.embed, nn.Module):
            check_input_size(self.embed, self.size)
        done = 0

        def count(images: int) -> None:
            nonlocal done
            done = min(done + images * self.ranks.world_size, data.num_images)
            if progress:
                progress(done, data.num_images)

        def own(_: Path, start: int, stop: int) -> Tensor:
            return self._rows(data, loader, start, stop, count)

        def extract(start: int, stop: int) -> Tensor:
            nonlocal done
            done = start
            if self.ranks.world_size == 1:
                return own(data.named, start, stop)
            return ask(own, data.named, start, stop, loader.batch_size, self.ranks)

        what = (self.tokens, self.interpolation, tuple(self.mean), tuple(self.std), geometry(loader))
        key = FeatureKey(self.source, data.manifest.fingerprint, self.size, *what)
        try:
            features = (
                cached_features(keep_in, key, data.num_images, extract) if keep_in else extract(0, data.num_images)
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MisuseError(
                f"not enough memory for {loader.batch_size} images of {self.size} x {self.size} px at a time: "
                "lower `batch_size` or `size`"
            ) from error
        if progress:
            progress(data.num_images, data.num_images)  # kept ones need no time, and are seen to be done
        return features

    def help(self, loader: LoaderConfig) -> None:
        """On any but the first of ``ranks``: make the rows that it asks for, until it lets go."""

        def rows(path: Path, start: int, stop: int) -> Tensor:
            return self._rows(Beton(path), loader, start, stop)

        help_out(rows, loader.batch_size, self.ranks)

    def let_go(self) -> None:
        """On the first of ``ranks``: there is nothing more to extract."""
        if self.ranks.world_size > 1:
            let_go()

    def _rows(
        self,
        data: Beton,
        loader: LoaderConfig,
        start: int,
        stop: int,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        batches = self.centred(data, loader, np.arange(start, stop))
        return extract_features(self.embed, batches, start, stop, progress)

    def centred(self, data: Beton, loader: LoaderConfig, image_ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """``batches`` of the middle of each image."""
        recipe = evaluation_recipe(share_seen(self.size), self.interpolation)
        return self.batches(ViewLoader(data, recipe, 0, loader), image_ids, 0)

    def batches(self, views: ViewLoader, image_ids: np.ndarray, view_id: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One view of each image, in the order given: ids (B,) int64 on the CPU, and images (B, 3, size, size) float32 as the
        network takes them, on its device.
        """
        mean, std = torch.tensor(self.mean, device=self.device), torch.tensor(self.std, device=self.device)
        for batch in views.epoch(image_ids, [ViewSet((view_id,), self.size)]):
            images = batch.to(self.device).augment(0, 1.0, mean, std).flatten(0, 1)
            yield torch.from_numpy(batch.image_ids.copy()), images
