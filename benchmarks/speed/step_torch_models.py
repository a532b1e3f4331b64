"""The networks of step_models.py in torch, and their rows; for step_torch.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A transformer block, normalised first."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.first(x)
        parts = [
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        ]
        y = functional.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Blocks between an embedding of tokens or patches and a head."""

    def __init__(self, start, length, width, depth, heads, outputs, causal):
        super().__init__()
        self.start, self.causal = start, causal
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *[Block(width, heads, causal) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=not causal)

    def forward(self, x):
        x = self.start(x)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        places = torch.arange(x.shape[1]).repeat(x.shape[0], 1)
        x = self.norm(self.blocks(x + self.places(places)))
        return self.head(x if self.causal else x.mean(1))


class Residual(nn.Module):
    """A basic block of a ResNet with GroupNorm."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.first = convolution(before, width, 3, stride)
        self.second = convolution(width, width, 3, 1)
        same = before == width and stride == 1
        self.short = nn.Identity() if same else convolution(before, width, 1, stride)

    def forward(self, x):
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(self.short(x) + y)


def convolution(before: int, width: int, side: int, stride: int) -> nn.Module:
    """A convolution without bias, then GroupNorm."""
    conv = nn.Conv2d(before, width, side, stride, side // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(min(32, width), width))


def mlp(inputs=784, width=1000):
    layers = nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 10)
    return nn.Sequential(*layers), (inputs,)


def mnist_cnn(channels=(16, 32)):
    a, b = channels
    first = [nn.ZeroPad2d(3), nn.Conv2d(1, a, 8, 2), nn.ReLU(), nn.MaxPool2d(2, 1)]
    second = [nn.Conv2d(a, b, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()]
    head = [nn.Linear(16 * b, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*first, *second, *head), (1, 28, 28)


def cifar_cnn(side=32, channels=(32, 32, 64, 64, 128, 128, 256)):
    layers: list[nn.Module] = []
    for i, (before, width) in enumerate(zip((3, *channels), channels, strict=False)):
        layers += [nn.Conv2d(before, width, 3, 1, 1)]
        layers += [nn.GroupNorm(min(8, width), width), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if i in (1, 3, 5) else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)]
    return nn.Sequential(*layers), (3, side, side)


def resnet(side=32, widths=(64, 128, 256, 512), blocks=2):
    layers: list[nn.Module] = [convolution(3, widths[0], 3, 1), nn.ReLU()]
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers += [Residual(before, width, 2 if stage and not block else 1)]
            before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    return nn.Sequential(*layers), (3, side, side)


def lm(vocabulary=1000, length=64, width=128, depth=4, heads=4):
    start = nn.Embedding(vocabulary, width)
    model = Transformer(start, length, width, depth, heads, vocabulary, True)
    return model, (vocabulary, length)


def vit(side=32, patch=4, width=192, depth=4, heads=3):
    start = nn.Conv2d(3, width, patch, patch)
    length = (side // patch) ** 2
    return Transformer(start, length, width, depth, heads, 10, False), (3, side, side)


class Spec(NamedTuple):
    """What a row is, at full and at toy size."""

    model: Callable[..., tuple[nn.Module, tuple[int, ...]]]
    changes: dict[str, Any]
    toy: dict[str, Any]
    batch_size: int
    chunks: tuple[int, ...]


_V10K = dict(vocabulary=10_000, length=32, depth=2)
_D256 = dict(width=256, length=128)
_TOY_LM = dict(vocabulary=11, length=4, width=8, depth=1, heads=2)
_TOY_RESNET = dict(side=8, widths=(4, 8), blocks=1)
ROWS: dict[str, Spec] = {
    "mlp": Spec(mlp, {}, dict(inputs=8, width=16), 256, (64,)),
    "mnist_cnn": Spec(mnist_cnn, {}, dict(channels=(2, 4)), 256, (64, 16)),
    "cifar_cnn": Spec(cifar_cnn, {}, dict(side=8, channels=[4] * 7), 256, (64, 16)),
    "lm_d128": Spec(lm, {}, _TOY_LM, 256, (32, 8)),
    "lm_v10k": Spec(lm, _V10K, _TOY_LM | dict(vocabulary=40), 32, (8,)),
    "lm_d256": Spec(lm, _D256, _TOY_LM | dict(length=8), 32, (8, 2)),
    "resnet18": Spec(resnet, {}, _TOY_RESNET, 64, (16, 8)),
    "vit": Spec(vit, {}, dict(side=8, width=6, depth=1), 64, (16, 8)),
}


class Task(NamedTuple):
    """A model with its batch."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def pieces(self, chunk: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The batch in micro-batches."""
        return list(zip(self.x.split(chunk), self.y.split(chunk), strict=True))


def task(name: str, toy: bool) -> tuple[Task, int, list[int]]:
    """Makes a row: model and batch, batch size and the micro-batches to try."""
    spec = ROWS[name]
    torch.manual_seed(0)
    model, shape = spec.model(**(spec.changes | (spec.toy if toy else {})))
    size = 4 if toy else spec.batch_size
    if spec.model is lm:
        ids = torch.randint(shape[0], (size, shape[1] + 1))
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    else:
        x, y = torch.randn(size, *shape), torch.arange(size) % 10
    return Task(model, x, y), size, [size, *([2] if toy else spec.chunks)]
