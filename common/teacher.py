"""The frozen teacher as both stages see it, and the one way from a batch of views to its embeddings."""

from collections.abc import Callable
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

from .own_network import OwnNetwork
from .run import PRECISIONS, autocast, choose_precision, pixel_dtype
from .views.batch import Batch
from .views.recipes import Recipe


class FrozenTeacher(Protocol):
    """What makes targets; ``teacher_cache.teachers.Teacher`` is one.

    ``mean`` and ``std`` (3,) normalise its images, ``dim`` is the embedding's width D. ``prototypes`` (K, D), the ``centre``
    (K,) of its own training, that of patches, and its ``teacher_temp`` are None where there are none; ``num_prototypes`` is K,
    or 0.
    """

    @property
    def name(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def view_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def num_prototypes(self) -> int: ...
    @property
    def prototypes(self) -> Tensor | None: ...
    @property
    def centre(self) -> Tensor | None: ...
    @property
    def teacher_temp(self) -> float | None: ...
    @property
    def patch_prototypes(self) -> Tensor | None: ...
    @property
    def patch_centre(self) -> Tensor | None: ...
    @property
    def head(self) -> nn.Module | None: ...
    @property
    def backbone(self) -> nn.Module: ...
    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, S, S) -> embeddings as below, and the backbone's map (N, C, h, w)."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) normalised by mean and std -> embeddings (N, D) float32, unit rows."""
        ...


def embedder(
    teacher: FrozenTeacher,
    recipe: Recipe,
    view_size: int,
    device: torch.device,
    precision: str,
) -> Callable[..., Tensor]:
    """The function of a batch, whose last view set has V views of ``view_size`` pixels a side, to their embeddings (B, V, D)
    float32 on ``device``, where ``teacher`` is already.

    With ``at_once`` (B or more) the teacher sees one view at a time, in batches padded with zeros to exactly so many images. A
    result's last bit may depend on the size of the batch: of a fixed size, a target does not depend on how many views an image
    has, or on a short last batch.
    """
    teacher = cast_once(teacher, device, precision)
    views_of = _views(teacher, recipe, view_size, device, precision)

    @torch.inference_mode()
    def embed(batch: Batch, at_once: int | None = None) -> Tensor:
        with autocast(device, precision):
            return _in_parts(lambda images: (teacher(images).float(),), views_of(batch), at_once)[0]

    return embed


def dense_embedder(
    teacher: FrozenTeacher,
    recipe: Recipe,
    view_size: int,
    device: torch.device,
    precision: str,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """As ``embedder``, with the backbone's maps (B, V, C, h, w) beside the embeddings."""
    teacher = cast_once(teacher, device, precision)
    views_of = _views(teacher, recipe, view_size, device, precision)

    @torch.inference_mode()
    def embed(batch: Batch, at_once: int | None = None) -> tuple[Tensor, Tensor]:
        with autocast(device, precision):
            embedding, features = _in_parts(teacher.with_map, views_of(batch), at_once)
        return embedding.float(), features

    return embed


def _in_parts(
    network: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, at_once: int | None
) -> tuple[Tensor, ...]:
    """What ``network`` says of images (B, V, 3, S, S), each (B, V, ...): of all in one, or view by view."""
    if at_once is None:
        return tuple(said.unflatten(0, images.shape[:2]) for said in network(images.flatten(0, 1)))
    assert len(images) <= at_once
    last = images[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    said = []
    for view in images.unbind(1):
        empty = view.new_zeros(at_once - len(images), *view.shape[1:])
        of_view = network((torch.cat([view, empty]) if len(empty) else view).contiguous(memory_format=layout))
        said.append([values[: len(images)] for values in of_view])
    return tuple(torch.stack(parts, 1) for parts in zip(*said, strict=True))


def _views(
    teacher: FrozenTeacher, recipe: Recipe, view_size: int, device: torch.device, precision: str
) -> Callable[[Batch], Tensor]:
    """A batch's views (B, V, 3, S, S) as the teacher takes them."""
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    dtype = pixel_dtype(device, precision)
    blur_scale = view_size / recipe.global_crops[0].size
    return lambda batch: batch.to(device).augment(-1, blur_scale, mean, std, dtype)


def on_device(teacher: FrozenTeacher, device: torch.device) -> FrozenTeacher:
    """The teacher, moved there if it is a module; a function is where it is."""
    return teacher.to(device) if isinstance(teacher, nn.Module) else teacher  # type: ignore[return-value]


def cast_once(teacher: FrozenTeacher, device: torch.device, precision: str) -> FrozenTeacher:
    """The teacher with its backbone's products in half precision already, on CUDA, where autocast would cast frozen weights for
    every batch anew. A copy: the teacher itself stays as it was loaded. A network of the user's own stays as it is, which may
    leave autocast inside."""
    dtype = PRECISIONS[choose_precision(device, precision)]
    backbone = getattr(teacher, "backbone", None)
    if (
        device.type != "cuda"
        or dtype is None
        or not isinstance(teacher, nn.Module)
        or not isinstance(backbone, nn.Module)
        or isinstance(backbone, OwnNetwork)
    ):
        return teacher
    copy = deepcopy(teacher)
    half_products(copy.backbone, dtype)  # type: ignore[arg-type]
    return copy


def half_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would: of plain linear layers and convolutions. Under autocast the network then computes,
    bit for bit, what it did."""
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(dtype)
