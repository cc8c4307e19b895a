"""The student and its objective as one module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..common.views.planes import moved
from .objectives import Objective
from .own_student import still_depth
from .students import patch_dropouts, pooled_and_map
from .targets.dense import TargetWithPatches
from .targets.joined import AnyTarget


class StudentWithHead(nn.Module):
    """The student and its objective (which owns the head) as one module: one optimiser, one checkpoint.

    A batch goes through the backbone in ``parts`` of equally many images, one after the other, and meets the head and the
    objective as a whole: centre, Sinkhorn, queue and loss know of no parts, only the backbone's BatchNorm does. With
    ``recompute``, as more than one part has from the start, the backward pass runs each part again rather than keep its
    activations: memory for one part is enough, at a third more time.
    """

    def __init__(self, backbone: nn.Module, objective: Objective, parts: int = 1) -> None:
        super().__init__()
        self.backbone, self.objective, self.parts, self.recompute = backbone, objective, parts, parts > 1
        self._patch_dropouts = patch_dropouts(backbone)
        self._compiled = False

    def forward(self, crops: list[Tensor], target: AnyTarget | None, pair_weights: Tensor) -> Tensor:
        """crops: one (B, n, 3, S, S) tensor a crop size, the global ones first. Each size is one forward pass."""
        if self.objective.norm_by_size:
            self.objective.views_by_size = [views.shape[1] for views in crops]
        if isinstance(target, TargetWithPatches):
            return self._with_patches(crops, target, pair_weights)
        features = [self.features(views, drop_patches=number == 0) for number, views in enumerate(crops)]
        return self.objective(torch.cat(features, dim=1), target, pair_weights)

    def features(self, views: Tensor, drop_patches: bool = False) -> Tensor:
        """Of the backbone: (B, n, 3, S, S) -> (B, n, F). ``drop_patches``: in training mode, if it does so at all."""
        return torch.cat([self._of_part(self._run, part, drop_patches) for part in views.chunk(self.parts)])

    def _with_patches(self, crops: list[Tensor], target: TargetWithPatches, pair_weights: Tensor) -> Tensor:
        hidden = self.objective.hidden_patches(target.placement)
        seen = [self.features_and_map(views, None if number else hidden) for number, views in enumerate(crops)]
        features, maps = torch.cat([pooled for pooled, _ in seen], dim=1), [map_ for _, map_ in seen]
        return self.objective.with_patches(features, maps, hidden, target, pair_weights)

    def features_and_map(self, views: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of the backbone: (B, n, 3, S, S) -> (B, n, F) and (B, n, C, h, w). ``hidden`` (B, n, h, w) bool: a ViT's patches that
        it does not see.
        """
        parts = views.chunk(self.parts)
        covers = (None,) * len(parts) if hidden is None else moved(hidden, views.device).chunk(self.parts)
        seen = [self._of_part(self._run_dense, part, cover) for part, cover in zip(parts, covers, strict=True)]
        features, maps = zip(*seen, strict=True)
        return torch.cat(features), torch.cat(maps)

    def _of_part(self, run: Callable[..., Any], *inputs: Any) -> Any:
        """What ``run`` gives, which the backward pass may run again."""
        if not (self.recompute and torch.is_grad_enabled()):
            return run(*inputs)
        contexts = lambda: (nullcontext(), still_statistics(self.backbone))  # noqa: E731
        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)

    def _run(self, views: Tensor, drop_patches: bool) -> Tensor:
        for layer in self._patch_dropouts:
            layer.train(drop_patches and self.training)
        return self.backbone(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def _run_dense(self, views: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        with (
            nullcontext() if hidden is None else hiding(self.backbone, hidden.flatten(0, 1), self.objective.mask_token)
        ):
            features, map_ = pooled_and_map(self.backbone, views.flatten(0, 1), self.objective.patch_layer)
        return features.unflatten(0, views.shape[:2]), map_.unflatten(0, views.shape[:2])

    def compile_backbone(self, replayed: bool = False) -> None:
        """Compile the backbone, once a crop size; its parameters, their names and its copies stay what they are. ``replayed``:
        as CUDA graphs, whose outputs hold until the next step. A copy is never replayed."""
        self._compiled = True
        self.backbone.compile(dynamic=False, mode="reduce-overhead" if replayed else None)

    def copy_for_targets(self) -> "StudentWithHead":
        """A copy that only embeds: it is not trained, gathers nothing and drops neither path nor patch."""
        copy = StudentWithHead(deepcopy(self.backbone), self.objective.copy_for_targets(), self.parts)
        for module in copy.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        still_depth(copy)
        if self._compiled:
            copy.compile_backbone()
        return copy.train(self.training).requires_grad_(False)


@contextmanager
def hiding(backbone: nn.Module, hidden: Tensor, token: Tensor | None) -> Iterator[None]:
    """Inside, a ViT has the ``token`` (1, C) in the place of the ``hidden`` (N, h, w) patches of its images, as in iBOT: before
    the position embedding.
    """
    assert token is not None

    def put(module: nn.Module, inputs: object, patches: Tensor) -> Tensor:
        cover = hidden if patches.ndim == 4 else hidden.flatten(1)  # NHWC where sizes may differ, else NLC
        return torch.where(cover.unsqueeze(-1), token.to(patches.dtype), patches)

    handle = backbone.get_submodule("patch_embed").register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorms leave their running statistics as they are: what is run again has been counted."""
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
