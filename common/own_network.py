"""Any network as both stages take one: images (B, 3, S, S) to features (B, F), by what it returns or by one of its layers.

A layer's output is pooled: a map (B, C, h, w) or tokens (B, N, C) to their mean, several of them side by side. The part that is
run is found out by trying: from the whole network inwards the first that takes images in training mode and comes by that layer (a
detector as a whole wants boxes, its backbone does not), and then as far inwards as the same comes out. The whole keeps its
tensors' own names, so that its own library loads them; what has no part in the layer stays as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MisuseError, named_line, some, unknown_name

INPUT = ":in"
"""Behind a layer's name: what goes into it, such as ``fc:in``, what a classifier's last layer is given."""
SHOWN = 6
"""Parts of a network that are listed."""
PROBE = 2
"""Images: BatchNorm in training mode wants two of one position."""


class _Enough(BaseException):
    """What was wanted of the network is there; no except of its own code is to take it for an error."""


class OwnNetwork(nn.Module):
    """``model``, of which ``layer`` (None: what it returns) is pooled, as features (B, ``num_features``).

    ``moved`` names the tensors of its state dict that training changes, none of a teacher's (``learns`` False). MisuseError: no
    such layer, or one that gives no features of images of ``size`` pixels a side, or has no gradient. ``whose`` begins the
    sentence, ``setting`` is that of the layer.
    """

    num_features: int

    def __init__(
        self, model: nn.Module, layer: str | None, size: int, whose: str, setting: str, learns: bool = True
    ) -> None:
        super().__init__()
        self.model, self.layer, self.whose, self.learns = model, layer, whose, learns
        self.kept: tuple[int, ...] | None = None
        self.entry = ""
        if layer is not None:
            known = [name for name, _ in model.named_modules() if name]
            if layer.removesuffix(INPUT) not in known:
                raise unknown_name(f"layer of {whose}", layer, known)
        if not all(isinstance(tensor, Tensor) for tensor in model.state_dict().values()):
            raise MisuseError(f"{whose}: its state dict holds more than tensors, which no weights file does")
        with _untouched(model), torch.random.fork_rng(devices=[]):
            self._find(size, setting)
        for name, parameter in model.named_parameters():  # what has no part in the features is not trained
            parameter.requires_grad_(name in self.moved and parameter.requires_grad)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_features)."""
        return pooled(self.outputs(images))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """What is pooled, each (B, C), (B, N, C) or (B, C, h, w)."""
        found = list(_tensors(self._raw(images, self.entry)))
        return found if self.kept is None else [found[number] for number in self.kept]

    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F), and the last of its maps (B, C, h, w). MisuseError: it has none."""
        outputs = self.outputs(images)
        maps = [output for output in outputs if output.ndim == 4 and output.shape[-1] * output.shape[-2] > 1]
        if not maps:
            raise MisuseError(f"{self.whose} gives no map of features: name a layer that does")
        return pooled(outputs), maps[-1]

    def forward_features(self, images: Tensor) -> Tensor:
        """The map of ``with_map``, as timm's networks give theirs."""
        return self.with_map(images)[1]

    def _raw(self, images: Tensor, entry: str) -> Any:
        part = self.model.get_submodule(entry)
        if self.layer is None or self.layer == entry:
            return part(images)
        name, before = self.layer.removesuffix(INPUT), self.layer.endswith(INPUT)
        layer, found = self.model.get_submodule(name), []

        def see(*seen: Any) -> None:
            found.append(seen[1][0] if before else seen[2])
            # What follows is not wanted, and its BatchNorms are to stay as they are.
            if not torch.compiler.is_exporting():
                raise _Enough

        # for one pass only: a hook that stayed would be that of the original in every copy
        handle = layer.register_forward_pre_hook(see) if before else layer.register_forward_hook(see)
        try:
            part(images)
        except _Enough:
            pass
        finally:
            handle.remove()
        if not found:
            raise RuntimeError(f"{name} is not run")
        return found[0]

    # ==== finding out ====

    def _find(self, size: int, setting: str) -> None:
        """Sets ``entry``, ``kept``, ``num_features`` and ``moved``."""
        weight = next(self.model.parameters(), None)
        if weight is None and self.learns:
            raise MisuseError(f"{self.whose} has no weights: there is nothing to train")
        images = torch.randn(PROBE, 3, size, size, device=None if weight is None else weight.device)
        self.entry = self._entry(images, setting)
        if not self.learns:
            with torch.no_grad():
                self.num_features, self.moved = pooled(self._tried(images, False)).shape[1], frozenset()
            return
        parameters = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        learned: set[str] = set()
        for training in (True, False):  # paths that are dropped in training have their part in evaluation
            found = self._tried(images, training)
            differentiable = tuple(number for number, output in enumerate(found) if output.requires_grad)
            if not differentiable:
                raise MisuseError(
                    f"{self.whose} has no gradient at its features: its weights are frozen, or it runs without gradients"
                )
            self.kept = differentiable
            features = pooled([found[number] for number in differentiable])
            gradients = torch.autograd.grad(features.square().sum(), [p for _, p in parameters], allow_unused=True)
            learned |= {n for (n, _), gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        self.num_features = features.shape[1]
        after = self.model.state_dict()
        shared = {after[name].data_ptr() for name in learned}  # by tensors of two names
        changed = {n for n, t in after.items() if t.data_ptr() in shared or not torch.equal(t, before[n])}
        self.moved = frozenset(learned | changed)

    def _entry(self, images: Tensor, setting: str) -> str:
        """The name of the part that is run, "" for the whole."""
        parts = [] if self.layer is None else self.layer.removesuffix(INPUT).split(".")
        names = ["", *accumulate(parts, lambda a, b: f"{a}.{b}")]
        if self.layer is not None and self.layer.endswith(INPUT):
            names.pop()
        reason = ""
        for number, name in enumerate(names):
            try:
                with torch.no_grad():
                    self.model.train(self.learns)
                    list(_tensors(self._raw(images, name)))
                    self.model.eval()
                    wanted = list(_tensors(self._raw(images, name)))
            except Exception as error:  # of any code
                reason = reason or named_line(error)
                continue
            return self._innermost(names[number:], wanted, images)
        tops = ", ".join(name for name, _ in self.model.named_children())
        inside = "no layer's output" if self.layer is None else f"{self.layer} cannot be had"
        hint = f"name the layer to pool with `{setting}`; it has {tops}" if self.layer is None else (
            f"name one that is run on images of {images.shape[-1]} px; it has {tops}"
        )  # fmt: skip
        raise MisuseError(
            f"{self.whose} makes no features of images {tuple(images.shape)}, {inside} ({reason}): {hint}"
        )

    def _innermost(self, names: list[str], wanted: list[Tensor], images: Tensor) -> str:
        """The last of ``names`` that gives what the first does: the rest would be computed for nothing."""
        self.model.eval()
        chosen = names[0]
        for name in names[1:]:
            try:
                with torch.no_grad():
                    found = list(_tensors(self._raw(images, name)))
            except Exception:
                continue
            if len(found) == len(wanted) and all(map(torch.equal, found, wanted)):
                chosen = name
        return chosen

    def _tried(self, images: Tensor, training: bool) -> list[Tensor]:
        """What comes out. MisuseError: nothing that can be pooled."""
        self.model.train(training)
        raw = self._raw(images, self.entry)
        if self.layer is None and not isinstance(raw, Tensor):
            raise MisuseError(
                f"{self.whose} returns a {type(raw).__name__}, expected features (B, F): name a layer of it to pool"
            )
        found = list(_tensors(raw))
        usable = [t for t in found if t.ndim in (2, 3, 4) and len(t) == PROBE and t.is_floating_point()]
        if not found or len(usable) < len(found):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found) or "no tensors"
            raise MisuseError(
                f"{self.whose} gives {shapes} for {PROBE} images, expected ({PROBE}, F) or a map ({PROBE}, C, h, w)"
            )
        return found


def whole_of(network: nn.Module) -> nn.Module:
    """The network whose tensors are written: of one of the user's own the whole, by its own names."""
    return network.model if isinstance(network, OwnNetwork) else network


def pooled(outputs: Iterable[Tensor]) -> Tensor:
    """(B, F): maps and tokens become their mean, several stand side by side."""
    vectors = [output if output.ndim == 2 else output.flatten(2).mean(2) if output.ndim == 4 else output.mean(1)
               for output in outputs]  # fmt: skip
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def parts_of(names: Iterable[str], others: Iterable[str]) -> str:
    """``names`` of tensors in few words: ``backbone.body, head.0.weight``, the outermost parts that hold none of the
    ``others``."""
    others, found = list(others), []
    for name in names:
        pieces = list(accumulate(name.split("."), lambda a, b: f"{a}.{b}"))
        part = next((p for p in pieces[:-1] if not any(other.startswith(f"{p}.") for other in others)), name)
        if part not in found:
            found.append(part)
    return some(found, SHOWN)


def _tensors(found: Any) -> Iterator[Tensor]:
    """Those in a tensor, a mapping or a sequence, in order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _tensors(value)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Modes and buffers are afterwards what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
