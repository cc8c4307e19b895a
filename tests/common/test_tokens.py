"""A ViT's tokens as features, against plain loops over its blocks and tokens."""

import pytest
import timm
import torch
from torch import nn

from rob.common.errors import MisuseError
from rob.common.tokens import TokenFeatures, check_tokens, token_features

VITS = {
    "vit_tiny_patch16_224": {"embed_dim": 24, "depth": 5, "num_heads": 3, "img_size": 32, "patch_size": 8},
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 28},
    "vit_small_patch16_dinov3": {"embed_dim": 48, "depth": 4, "img_size": 32},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32},
}
PREFIX = {"vit_small_patch14_reg4_dinov2": 5, "vit_small_patch16_dinov3": 5, "deit_tiny_distilled_patch16_224": 2}


@pytest.fixture(params=VITS)
def vit(request) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=0, **VITS[request.param]).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.name, model.side = request.param, VITS[request.param]["img_size"]
    return model


def outputs_of_blocks(vit: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """(N, T, D) behind each block, as the forward pass makes them."""
    found = []
    hooks = [block.register_forward_hook(lambda *call: found.append(call[2])) for block in vit.blocks]
    with torch.no_grad():
        vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    return found


def test_every_kind_is_what_a_loop_makes_of_the_blocks(vit):
    images = torch.randn(2, 3, vit.side, vit.side, dtype=torch.float64)
    blocks = outputs_of_blocks(vit, images)
    with torch.no_grad():
        normed = [vit.norm(tokens) for tokens in blocks]
        found = {kind: token_features(vit, images, kind) for kind in ("cls", "mean", "cls+mean", "cls4")}
    for n in range(2):
        cls, patches = normed[-1][n, 0], normed[-1][n, PREFIX.get(vit.name, 1) :]
        mean = sum(patches) / len(patches)
        four = [value for tokens in normed[-4:] for value in tokens[n, 0].tolist()]
        expected = {
            "cls": cls,
            "mean": mean,
            "cls+mean": torch.cat([cls, mean]),
            "cls4": torch.tensor(four, dtype=torch.float64),
        }
        for kind, values in expected.items():
            torch.testing.assert_close(found[kind][n], values, rtol=0, atol=1e-10, msg=kind)


def test_the_module_trains_the_network_that_it_has(vit):
    module = TokenFeatures(vit, "cls4", "vit")
    module(torch.randn(2, 3, vit.side, vit.side, dtype=torch.float64)).sum().backward()
    assert all(block.norm1.weight.grad is not None for block in vit.blocks)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("features", ["cls4", "cls+mean"])
def test_what_has_no_class_token_in_its_blocks_is_refused(name, features):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    with pytest.raises(
        MisuseError, match=f"`features` {features.replace('+', '.')} wants the class token of a ViT and {name}"
    ):
        check_tokens(backbone, features, name)


def test_four_blocks_of_three_are_refused():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=24, depth=3, num_heads=3)
    check_tokens(vit, "cls+mean", "tiny")
    with pytest.raises(
        MisuseError, match="`features` cls4 wants a ViT of 4 blocks or more and tiny has 3: leave it out"
    ):
        check_tokens(vit, "cls4", "tiny")
