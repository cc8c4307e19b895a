"""What ranks do together, over NCCL with the one rank that a GPU has: the calls are made, and leave things as they were."""

import os
import socket

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rob.benchmarks.gpu_check.section import NotHere, Section
from rob.common import ranks
from rob.common.batchnorm import _Joined
from rob.student_train.kernels import DenseTarget
from rob.student_train.kernels.sinkhorn import over_ranks, sinkhorn_offsets
from rob.student_train.objectives.queue import Queue


def run(section: Section) -> None:
    if not dist.is_available():
        raise NotHere("this torch has no distributed package")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cuda = section.device.type == "cuda"
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        section.attempt("collectives", lambda: _collectives(section))
        section.attempt("DistributedDataParallel", lambda: _parallel(section))
        section.attempt("BatchNorm", lambda: _batchnorm(section))
        section.attempt("Sinkhorn and queue", lambda: _objectives(section))
    finally:
        ranks.leave_ranks()


def _collectives(section: Section) -> None:
    values = torch.arange(6.0, device=section.device).view(3, 2)
    total, parts = values.clone(), [torch.empty_like(values)]
    dist.all_reduce(total)
    dist.all_gather(parts, values)
    section.check("all_reduce leaves a lone rank's values", (total - values).abs().max(), 0.0)
    section.check("all_gather leaves a lone rank's values", (parts[0] - values).abs().max(), 0.0)
    learned = values.clone().requires_grad_()
    (ranks._MeanOverRanks.apply(learned) ** 2).sum().backward()  # type: ignore[union-attr]
    assert learned.grad is not None
    section.check("the mean over ranks passes its gradient on", (learned.grad - 2 * values).abs().max(), 1e-6)
    flag = torch.tensor(3)
    dist.all_reduce(flag, dist.ReduceOp.MAX)  # on the CPU, as the stop flag is
    section.check("the CPUs agree beside", abs(int(flag) - 3), 0.0)


def _parallel(section: Section) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(section.device)
    images = torch.randn(32, 8, device=section.device)
    network(images).square().mean().backward()
    alone = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    for _ in range(2):
        network.zero_grad()
        parallel(images).square().mean().backward()
    together = [p.grad for p in network.parameters() if p.grad is not None]
    off = max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True))
    section.check("DDP gives a lone rank's gradients", off, 1e-6)


def _batchnorm(section: Section) -> None:
    alone, joined = (nn.BatchNorm2d(8).to(section.device) for _ in range(2))
    images, upstream = torch.randn(2, 4, 8, 9, 9, device=section.device).to(memory_format=torch.channels_last_3d)
    found = []
    for layer in (alone, joined):
        given = images.clone().requires_grad_()
        if layer is alone:
            made = layer(given)
        else:
            running = (layer.running_mean, layer.running_var, layer.momentum)
            made: torch.Tensor = _Joined.apply(given, layer.weight, layer.bias, running, layer.eps, None, 1)  # type: ignore
        made.backward(upstream)
        found.append((made, given.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    for name, one, other in zip(
        ("output", "input's gradient", "weight's", "bias's", "mean", "variance"), *found, strict=True
    ):
        section.check(f"joined BatchNorm is a lone rank's own: {name}", (one - other).detach().abs().max(), 1e-4)


def _objectives(section: Section) -> None:
    queue = Queue(16, 4).to(section.device)
    rows = torch.randn(4, 4, device=section.device)
    queue.push(rows)
    section.check("the queue takes the newest rows", (queue.rows[:4] - rows).abs().max(), 0.0)
    target = DenseTarget(torch.randn(8, 2, 32, device=section.device))
    alone = sinkhorn_offsets(target, 0.1).column
    together = sinkhorn_offsets(target, 0.1, log_sum_over_ranks=over_ranks).column
    section.check("Sinkhorn over ranks is a lone rank's own", (alone - together).abs().max(), 1e-4)
