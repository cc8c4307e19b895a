"""The official networks from scratch, as functions of weights under their published names, to check the loader against.

``Weights`` makes a tensor the first time that a network asks for it: running a network on a fresh ``Weights`` gives both
a state dict in the official layout and the features that belong to it, with no code shared with timm or with ``rob``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """A state dict that grows as its tensors are asked for: random values of the size that trained ones have."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            noise = torch.randn(shape, generator=self.generator)
            if name.endswith("running_var"):
                self[name] = 0.5 + noise.abs()
            elif len(shape) == 1:
                gain = name.endswith(("weight", "gamma", "gamma1", "gamma2", "gamma3"))
                self[name] = 0.1 * noise + (1.0 if gain else 0.0)
            else:
                self[name] = noise / noise[0].numel() ** 0.5
        return self[name]

    def linear(self, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        return F.linear(x, self(f"{name}.weight", out, x.shape[-1]), self(f"{name}.bias", out) if bias else None)

    def conv(self, x: Tensor, name: str, out: int, size: int, bias: bool = False, groups: int = 1, **options) -> Tensor:
        weight = self(f"{name}.weight", out, x.shape[1] // groups, size, size)
        return F.conv2d(x, weight, self(f"{name}.bias", out) if bias else None, groups=groups, **options)

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        width = x.shape[-1]
        return F.layer_norm(x, (width,), self(f"{name}.weight", width), self(f"{name}.bias", width), eps)

    def batch_norm(self, x: Tensor, name: str, affine: bool = True) -> Tensor:
        width = x.shape[1]
        mean, var = self(f"{name}.running_mean", width), self(f"{name}.running_var", width)
        self.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        scale = (self(f"{name}.weight", width), self(f"{name}.bias", width)) if affine else (None, None)
        return F.batch_norm(x, mean, var, *scale)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        width = x.shape[-1]
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1", 4 * width)), f"{name}.fc2", width)


def vit(w: Weights, images: Tensor, dim: int, depth: int, heads: int, patch: int, layer_scale: bool = False) -> Tensor:
    """The class token of dino's, ibot's, msn's and moco-v3's VisionTransformer; with ``layer_scale``, dinov2's."""
    x = w.conv(images, "patch_embed.proj", dim, patch, bias=True, stride=patch).flatten(2).transpose(1, 2)
    batch, tokens = len(x), x.shape[1] + 1
    x = torch.cat([w("cls_token", 1, 1, dim).expand(batch, 1, dim), x], dim=1) + w("pos_embed", 1, tokens, dim)
    for block in (f"blocks.{index}" for index in range(depth)):
        qkv = w.linear(w.layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv", 3 * dim)
        q, k, v = qkv.reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) * (dim // heads) ** -0.5).softmax(dim=3) @ v
        y = w.linear(mixed.transpose(1, 2).reshape(batch, tokens, dim), f"{block}.attn.proj", dim)
        x = x + (y * w(f"{block}.ls1.gamma", dim) if layer_scale else y)
        y = w.mlp(w.layer_norm(x, f"{block}.norm2"), f"{block}.mlp")
        x = x + (y * w(f"{block}.ls2.gamma", dim) if layer_scale else y)
    return w.layer_norm(x, "norm")[:, 0]


def resnet(
    w: Weights, images: Tensor, layers: tuple[int, ...], width: int = 64, stem: int = 64, padded: bool = False
) -> Tensor:
    """torchvision's bottleneck ResNet, as dino and moco use it; ``padded`` is swav's, which pads before the first layer."""
    x = F.pad(images, (1, 1, 1, 1)) if padded else images
    x = w.batch_norm(w.conv(x, "conv1", stem, 7, stride=2, padding=2 if padded else 3), "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate(layers):
        planes = width * 2**stage
        for index in range(blocks):
            block, stride = f"layer{stage + 1}.{index}", 2 if stage > 0 and index == 0 else 1
            y = w.batch_norm(w.conv(x, f"{block}.conv1", planes, 1), f"{block}.bn1").relu()
            y = w.batch_norm(w.conv(y, f"{block}.conv2", planes, 3, stride=stride, padding=1), f"{block}.bn2").relu()
            y = w.batch_norm(w.conv(y, f"{block}.conv3", 4 * planes, 1), f"{block}.bn3")
            if index == 0:
                x = w.conv(x, f"{block}.downsample.0", 4 * planes, 1, stride=stride)
                x = w.batch_norm(x, f"{block}.downsample.1")
            x = (x + y).relu()
    return x.mean(dim=(2, 3))


def swin(w: Weights, images: Tensor, dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Tensor:
    """ibot's SwinTransformer, the mean of its last tokens; attention by the definition, without windows' bookkeeping.

    Two tokens attend to each other when they share a window and, where windows wrap around the edge, a side of it.
    """
    x = w.layer_norm(
        w.conv(images, "patch_embed.proj", dim, 4, bias=True, stride=4).permute(0, 2, 3, 1), "patch_embed.norm"
    )
    for stage, depth in enumerate(depths):
        batch, side, _, width = x.shape
        span = min(window, side)
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            shift = span // 2 if index % 2 and side > window else 0
            place = torch.arange(side)
            rolled = (place - shift) % side  # where each row or column lands
            label = rolled // span * 3 + (place < shift).long() * (shift > 0)
            rows, columns = (grid.flatten() for grid in torch.meshgrid(place, place, indexing="ij"))
            same = (label[rows][:, None] == label[rows]) & (label[columns][:, None] == label[columns])
            offset = [rolled[axis][:, None] - rolled[axis] + span - 1 for axis in (rows, columns)]
            table = w(f"{block}.attn.relative_position_bias_table", (2 * span - 1) ** 2, heads[stage])
            bias = table[(offset[0].clamp(0, 2 * span - 2) * (2 * span - 1) + offset[1].clamp(0, 2 * span - 2))]
            qkv = w.linear(w.layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv", 3 * width)
            q, k, v = qkv.reshape(batch, side**2, 3, heads[stage], width // heads[stage]).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(2, 3) * (width // heads[stage]) ** -0.5 + bias.permute(2, 0, 1)
            mixed = scores.masked_fill(~same, -torch.inf).softmax(dim=3) @ v
            x = x + w.linear(mixed.transpose(1, 2).reshape(x.shape), f"{block}.attn.proj", width)
            x = x + w.mlp(w.layer_norm(x, f"{block}.norm2"), f"{block}.mlp")
        if stage < len(depths) - 1:
            quarters = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=3)
            merge = f"layers.{stage}.downsample"
            x = w.linear(w.layer_norm(quarters, f"{merge}.norm"), f"{merge}.reduction", 2 * width, bias=False)
    return w.layer_norm(x, "norm").mean(dim=(1, 2))


def xcit(w: Weights, images: Tensor, dim: int, depth: int, heads: int, patch: int) -> Tensor:
    """facebookresearch/xcit's XCiT, the class token."""
    x = images
    steps = {8: 3, 16: 4}[patch]
    for step in range(steps):
        if step:
            x = F.gelu(x)
        x = w.conv(x, f"patch_embed.proj.{2 * step}.0", dim // 2 ** (steps - 1 - step), 3, stride=2, padding=1)
        x = w.batch_norm(x, f"patch_embed.proj.{2 * step}.1")
    batch, _, height, width = x.shape
    frequency = 10000 ** (2 * (torch.arange(32) // 2) / 32)
    axes = []
    for size, shape in ((height, (1, height, 1, 1)), (width, (1, 1, width, 1))):
        angle = (torch.arange(1, size + 1) / (size + 1e-6) * 2 * torch.pi)[:, None] / frequency
        wave = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)
        axes.append(wave.reshape(*shape[:3], 32).expand(1, height, width, 32))
    position = w.conv(torch.cat(axes, dim=3).permute(0, 3, 1, 2), "pos_embeder.token_projection", dim, 1, bias=True)
    x = (x + position).flatten(2).transpose(1, 2)
    tokens = height * width
    for block in (f"blocks.{index}" for index in range(depth)):
        qkv = w.linear(w.layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv", 3 * dim)
        q, k, v = qkv.reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=3) @ F.normalize(k, dim=3).transpose(2, 3)
        mixed = (scores * w(f"{block}.attn.temperature", heads, 1, 1)).softmax(dim=3) @ v
        y = w.linear(mixed.permute(0, 3, 1, 2).reshape(batch, tokens, dim), f"{block}.attn.proj", dim)
        x = x + w(f"{block}.gamma1", dim) * y
        y = w.layer_norm(x, f"{block}.norm3").transpose(1, 2).reshape(batch, dim, height, width)
        y = F.gelu(w.conv(y, f"{block}.local_mp.conv1", dim, 3, bias=True, groups=dim, padding=1))
        y = w.batch_norm(y, f"{block}.local_mp.bn")
        y = w.conv(y, f"{block}.local_mp.conv2", dim, 3, bias=True, groups=dim, padding=1)
        x = x + w(f"{block}.gamma3", dim) * y.flatten(2).transpose(1, 2)
        x = x + w(f"{block}.gamma2", dim) * w.mlp(w.layer_norm(x, f"{block}.norm2"), f"{block}.mlp")
    x = torch.cat([w("cls_token", 1, 1, dim).expand(batch, 1, dim), x], dim=1)
    for block in (f"cls_attn_blocks.{index}" for index in range(2)):
        normed = w.layer_norm(x, f"{block}.norm1")
        qkv = w.linear(normed, f"{block}.attn.qkv", 3 * dim)
        q, k, v = qkv.reshape(batch, tokens + 1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = (q[:, :, :1] @ k.transpose(2, 3) * (dim // heads) ** -0.5).softmax(dim=3) @ v
        cls = w.linear(mixed.transpose(1, 2).reshape(batch, 1, dim), f"{block}.attn.proj", dim)
        x = x + w(f"{block}.gamma1", dim) * torch.cat([cls, normed[:, 1:]], dim=1)
        x = w.layer_norm(x, f"{block}.norm2")
        cls = w(f"{block}.gamma2", dim) * w.mlp(x[:, :1], f"{block}.mlp")
        x = x + torch.cat([cls, x[:, 1:]], dim=1)
    return w.layer_norm(x, "norm")[:, 0]
