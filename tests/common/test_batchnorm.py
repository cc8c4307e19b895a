"""BatchNorm over the ranks of a machine is BatchNorm over their joined batch."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from rob.common import batchnorm, ranks
from rob.common.batchnorm import JoinedBatchNorm, join_batchnorms
from rob.common.ranks import Ranks
from support.rank_threads import World

RANKS = 3


def outcome(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    found = {"y": y.detach(), "x": x.grad} | {name: value.grad for name, value in layer.named_parameters()}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


def kernels_of_cuda(monkeypatch) -> None:
    """What torch has on CUDA alone, in the words of its documentation: arguments in the wrong place are seen."""

    def stats(x, eps):
        variance, mean = torch.var_mean(x.float(), rows(x), correction=0)
        return mean, (variance + eps).rsqrt()

    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        share, total = counts[:, None] / counts.sum(), counts.sum()
        mean = (means * share).sum(0)
        variance = ((invstds**-2 - eps + means**2) * share).sum(0) - mean**2
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance * total / (total - 1), alpha=momentum)
        return mean, (variance + eps).rsqrt()

    def elemt(x, weight, bias, mean, invstd, eps):
        return ((x - wide(mean, x)) * wide(invstd * weight, x) + wide(bias, x)).contiguous()

    def backward_reduce(dy, x, mean, invstd, weight, *needed):
        assert needed == (True, True, True)
        centred = (dy * (x - wide(mean, x))).sum(rows(x))
        return dy.sum(rows(x)), centred, centred * invstd, dy.sum(rows(x))

    def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
        assert counts.dtype == torch.int32
        total = counts.sum()
        inner = dy - wide(sum_dy / total, x) - (x - wide(mean, x)) * wide(invstd**2 * sum_dy_xmu / total, x)
        return inner * wide(invstd * weight, x)

    def rows(x):
        return [d for d in range(x.ndim) if d != 1]

    def wide(values, x):
        return values.view(1, -1, *[1] * (x.ndim - 2))

    names = {"stats": stats, "gather_stats_with_counts": gather, "elemt": elemt}
    for name, work in (names | {"backward_reduce": backward_reduce, "backward_elemt": backward_elemt}).items():
        monkeypatch.setattr(torch, f"batch_norm_{name}", work)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3, 2)])
def test_ranks_are_as_one(monkeypatch, shape, kernels):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5, momentum=0.3) if len(shape) == 4 else nn.BatchNorm1d(5, momentum=0.3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, upstream = torch.randn(RANKS, *shape) * 2 + 1, torch.randn(RANKS, *shape)
    if len(shape) == 4:
        x[1] = x[1].to(memory_format=torch.channels_last)
    joined = [JoinedBatchNorm.of(deepcopy(layer)) for _ in range(RANKS)]
    expected = outcome(layer, x.flatten(0, 1), upstream.flatten(0, 1))
    batchnorm.machine_group.cache_clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
    if kernels:
        kernels_of_cuda(monkeypatch)
    found = World(monkeypatch, RANKS).run(lambda rank: outcome(joined[rank], x[rank], upstream[rank]))
    close = dict(rtol=1e-4, atol=1e-5)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([one[name] for one in found]), expected[name], **close)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(one[name] for one in found), expected[name], **close)
    for one in found:
        for name, _ in layer.named_buffers():
            torch.testing.assert_close(one[name], expected[name], **close)


def test_a_student_keeps_all_but_its_batches(monkeypatch):
    """Also what timm's BatchNorms bring along, the names of weights, and evaluation."""
    alone = timm.create_model("mobilenetv2_035").eval()
    join_batchnorms(alone)
    assert not any(isinstance(module, JoinedBatchNorm) for module in alone.modules())
    monkeypatch.setattr(batchnorm, "current_ranks", lambda: Ranks(0, 2))
    model = timm.create_model("mobilenetv2_035")
    weights = {id(parameter) for parameter in model.parameters()}
    join_batchnorms(model)
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert layers
    assert all(isinstance(layer, JoinedBatchNorm) for layer in layers)
    assert {id(parameter) for parameter in model.parameters()} == weights
    model.load_state_dict(alone.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), alone(images))
    assert type(model.bn1.act) is nn.ReLU6


def test_machines_join_their_own_ranks(monkeypatch):
    made = []
    monkeypatch.setattr(ranks.dist, "new_subgroups", lambda size: made.append(size) or ("mine", None))
    for here, world, expected in (("4", 8, ("mine", 4)), ("8", 8, (None, 8)), ("3", 8, (None, 8))):
        batchnorm.machine_group.cache_clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert batchnorm.machine_group(world) == expected
    assert made == [4]
    batchnorm.machine_group.cache_clear()
