"""The shared heads, against PyTorch's own layers put together the way the published code does."""

import pytest
import torch
from torch import nn

from rob.common.heads import ProjectionHead, Prototypes


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("num_layers", "activation", "norm", "kinds"),
    [
        (3, "gelu", False, "Linear GELU Linear GELU Linear"),  # DINO, iBOT
        (2, "gelu", True, "Linear BatchNorm1d GELU Linear"),  # DINO ResNet-50
        (2, "relu", True, "Linear BatchNorm1d ReLU Linear"),  # SwAV
        (3, "gelu", True, "Linear BatchNorm1d GELU Linear BatchNorm1d GELU Linear"),  # MSN
        (2, "relu", False, "Linear ReLU Linear"),  # MoCo-v2
        (1, "gelu", True, "Linear"),
    ],
)
def test_each_published_head_is_a_setting_of_one_class(num_layers, activation, norm, kinds) -> None:
    head = ProjectionHead(5, 7, 3, num_layers, activation, norm)
    assert " ".join(type(layer).__name__ for layer in head.mlp) == kinds
    embedding = head(torch.randn(4, 5))
    assert embedding.shape == (4, 3)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("num_layers", "activation", "norm", "kinds"),
    [
        (2, None, True, "Linear BatchNorm1d"),  # a CNN
        (2, None, False, "Linear"),  # a ViT
        (3, "gelu", False, "Linear GELU Linear GELU"),  # iBOT
    ],
)
def test_robs_mlp_ends_in_prototypes_with_biases(num_layers, activation, norm, kinds) -> None:
    head, last = ProjectionHead(5, 7, None, num_layers, activation, norm), Prototypes(9, 7, False, bias=True)
    assert " ".join(type(layer).__name__ for layer in head.mlp) == kinds
    torch.nn.init.normal_(last.bias)
    rows = torch.randn(4, 5)
    torch.testing.assert_close(last(head(rows)), head.mlp(rows) @ last.weight.T + last.bias)


def test_rows_of_any_length() -> None:
    head, rows = ProjectionHead(5, 7, 3, 2, None, norm=True, unit=False), torch.randn(4, 5)
    assert " ".join(type(layer).__name__ for layer in head.mlp) == "Linear BatchNorm1d Linear"
    torch.testing.assert_close(head(rows), head.mlp(rows))


def test_the_embedding_is_a_float32_unit_vector_under_autocast() -> None:
    head = ProjectionHead(5, 7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        embedding = head(torch.randn(4, 5))
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))


def test_weight_norm_agrees_with_pytorchs_own() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False))
    gain, direction = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
    with torch.no_grad():
        gain.uniform_(0.5, 2.0)  # DINO trains the gain where norm_last_layer is false
    prototypes = Prototypes(9, 6, weight_norm=True, learn_gain=True)
    prototypes.load_state_dict({"weight_g": gain.detach(), "weight_v": direction.detach()})
    embedding = torch.randn(4, 6)
    torch.testing.assert_close(prototypes(embedding), linear(embedding))
    assert prototypes.weight_g.requires_grad


def test_rows_are_unit_vectors_until_the_gain_is_learned() -> None:
    prototypes = Prototypes(9, 6)
    torch.testing.assert_close(prototypes.matrix().norm(dim=1), torch.ones(9))
    assert [name for name, parameter in prototypes.named_parameters() if parameter.requires_grad] == ["weight_v"]


def test_plain_prototypes_keep_their_rows_as_they_are() -> None:
    prototypes = Prototypes(9, 6, weight_norm=False)
    rows = torch.randn(9, 6)
    prototypes.load_state_dict({"weight": rows})
    embedding = torch.randn(4, 6)
    torch.testing.assert_close(prototypes(embedding), embedding @ rows.T)
