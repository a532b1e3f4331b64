"""Models of the step benchmarks: one function a model, one line of `ROWS` a row.

Used by step.py and growth.py; `step_torch.py` builds the same networks in
torch. Every network maps a batch of inputs to logits; the ordinary step differentiates
the mean loss of a batch as a user would write it, the private ones the loss of one
example, which is the mean loss of a batch of one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Data = Callable[[int], tuple[jax.Array, jax.Array]]


class Row(NamedTuple):
    """A model with its data and the micro-batches to try."""

    params: Any
    mean_loss: Callable[[Any, Any], jax.Array]
    loss_fn: Callable[[Any, Any], jax.Array]
    batch: tuple[jax.Array, jax.Array]
    batch_size: int
    chunks: tuple[int, ...]
    unrolled: tuple[int, ...]


class Mlp(nn.Module):
    """Tanh layers of these widths and ten logits."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class MnistCnn(nn.Module):
    """The two-convolution net of the DP-SGD tutorials."""

    channels: tuple[int, int]
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.channels[0], (8, 8), 2, "SAME")(x))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.relu(nn.Conv(self.channels[1], (4, 4), 2, "VALID")(x))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class CifarCnn(nn.Module):
    """Seven convolutions with GroupNorm, after Papernot et al. 2021."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, channels in enumerate(self.channels):
            x = nn.Conv(channels, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(num_groups=min(8, channels))(x))
            if i in (1, 3, 5):
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class ResNet(nn.Module):
    """ResNet of basic blocks with GroupNorm and the stem for small images."""

    widths: tuple[int, ...]
    blocks: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                x = self.block(x, width, 2 if stage and not block else 1)
        return nn.Dense(10)(x.mean((1, 2)))

    def norm(self, x):
        return nn.GroupNorm(num_groups=min(32, x.shape[-1]))(x)

    def block(self, x, width, stride):
        y = self.norm(nn.Conv(width, (3, 3), stride, use_bias=False)(x))
        y = self.norm(nn.Conv(width, (3, 3), use_bias=False)(nn.relu(y)))
        if x.shape != y.shape:
            x = self.norm(nn.Conv(width, (1, 1), stride, use_bias=False)(x))
        return nn.relu(x + y)


class Block(nn.Module):
    """A transformer block, normalised first."""

    heads: int

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Lm(nn.Module):
    """A causal language model with learned positions and an untied head."""

    vocabulary: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[-1]
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(length, self.width)(jnp.arange(length))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x = Block(self.heads)(x, mask)
        return nn.Dense(self.vocabulary, use_bias=False)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    """One LSTM layer, which a scan over the tokens runs."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        width, draw = self.width, nn.initializers.lecun_normal()
        inputs = self.param("inputs", draw, (width, 4 * width))
        state = self.param("state", draw, (width, 4 * width))
        bias = self.param("bias", nn.initializers.zeros, (4 * width,))

        def cell(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ inputs + h @ state + bias, 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        x = nn.Embed(self.vocabulary, width)(tokens)
        zero = jnp.zeros((x.shape[0], width))
        hidden = jax.lax.scan(cell, (zero, zero), x.swapaxes(0, 1))[1]
        return nn.Dense(self.vocabulary)(hidden.swapaxes(0, 1))


class Vit(nn.Module):
    """A vision transformer with the mean of the patches as its summary."""

    patch: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, "VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + nn.Embed(x.shape[1], self.width)(jnp.arange(x.shape[1]))
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class WeightNorm(nn.Module):
    """An MLP whose every kernel is a direction times a length, so no rule applies."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((*self.widths, 10)):
            shape = (x.shape[-1], width)
            v = self.param(f"v{i}", nn.initializers.lecun_normal(), shape)
            g = self.param(f"g{i}", nn.initializers.ones, (width,))
            x = x @ (g * v / jnp.linalg.norm(v, axis=0))
            x = jnp.tanh(x) if i < len(self.widths) else x
        return x


def vectors(*shape: int) -> Data:
    """Normal inputs of this shape with ten classes."""

    def draw(size: int) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.key(1), (size, *shape))
        return x, jnp.arange(size) % 10

    return draw


def tokens(vocabulary: int, length: int) -> Data:
    """Random tokens, each to be told from those before it."""

    def draw(size: int) -> tuple[jax.Array, jax.Array]:
        ids = jax.random.randint(
            jax.random.key(1), (size, length + 1), 0, vocabulary, "int32"
        )
        return ids[:, :-1], ids[:, 1:]

    return draw


def mlp(inputs=784, width=1000, depth=1) -> tuple[nn.Module, Data]:
    return Mlp((width,) * depth), vectors(inputs)


def mnist_cnn(side=28, channels=(16, 32), hidden=32) -> tuple[nn.Module, Data]:
    return MnistCnn(tuple(channels), hidden), vectors(side, side, 1)


def cifar_cnn(
    side=32, channels=(32, 32, 64, 64, 128, 128, 256)
) -> tuple[nn.Module, Data]:
    return CifarCnn(tuple(channels)), vectors(side, side, 3)


def resnet(side=32, widths=(64, 128, 256, 512), blocks=2) -> tuple[nn.Module, Data]:
    return ResNet(tuple(widths), blocks), vectors(side, side, 3)


def lm(vocabulary=1000, length=64, width=128, depth=4, heads=4):
    return Lm(vocabulary, width, depth, heads), tokens(vocabulary, length)


def lstm(vocabulary=1000, length=64, width=128) -> tuple[nn.Module, Data]:
    return Lstm(vocabulary, width), tokens(vocabulary, length)


def vit(side=32, patch=4, width=192, depth=4, heads=3) -> tuple[nn.Module, Data]:
    return Vit(patch, width, depth, heads), vectors(side, side, 3)


def weight_norm(inputs=784, width=256) -> tuple[nn.Module, Data]:
    return WeightNorm((width, width)), vectors(inputs)


class Spec(NamedTuple):
    """What a row is, at full and at toy size."""

    model: Callable[..., tuple[nn.Module, Data]]
    changes: dict[str, Any]
    toy: dict[str, Any]
    batch_size: int
    chunks: tuple[int, ...]
    unrolled: tuple[int, ...] = ()


_V10K = dict(vocabulary=10_000, length=32, depth=2)
_D256 = dict(width=256, length=128)
_TOY_LM = dict(vocabulary=11, length=4, width=8, depth=1, heads=2)
_TOY_RESNET = dict(side=8, widths=(4, 8), blocks=1)
_TOY_VIT = dict(side=8, width=6, depth=1)
# Unrolled accumulation is for the convolutions, whose backward passes XLA compiles
# badly inside a loop on a CPU.
ROWS: dict[str, Spec] = {
    "mlp": Spec(mlp, {}, dict(inputs=8, width=16), 256, (128, 64, 16)),
    "mnist_cnn": Spec(
        mnist_cnn, {}, dict(channels=(2, 4)), 256, (64, 32, 16, 8), (64, 32, 16, 8)
    ),
    "cifar_cnn": Spec(
        cifar_cnn, {}, dict(side=8, channels=[2] * 7), 256, (64, 32, 16), (64, 32, 16)
    ),
    "lm_d128": Spec(lm, {}, _TOY_LM, 256, (32, 8, 4, 2)),
    "lm_v10k": Spec(lm, _V10K, _TOY_LM | dict(vocabulary=40), 32, (16, 8, 4, 2)),
    "lm_d256": Spec(lm, _D256, _TOY_LM | dict(length=8), 32, (8, 4, 2, 1)),
    "resnet18": Spec(resnet, {}, _TOY_RESNET, 64, (16, 8, 4), (16, 8, 4)),
    "lstm": Spec(lstm, {}, dict(vocabulary=11, length=4, width=8), 64, (32, 16, 8)),
    "vit": Spec(vit, {}, _TOY_VIT, 64, (16, 8, 4, 2), (8, 4)),
    "no_fast_path": Spec(
        weight_norm, {}, dict(inputs=8, width=16), 256, (128, 64, 16, 4)
    ),
}

TOY_CHUNKS = ("mlp", "mnist_cnn")


def build(
    name: str, *, toy: bool = False, batch_size: int | None = None, **changes: Any
) -> Row:
    """Makes a row, with other dimensions or another batch size where asked."""
    spec = ROWS[name]
    module, data = spec.model(**(spec.changes | (spec.toy if toy else {}) | changes))
    size = batch_size or (4 if toy else spec.batch_size)
    batch = data(size)

    def mean_loss(params: Any, rows: Any) -> jax.Array:
        logits: Any = module.apply({"params": params}, rows[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[1])
        return jnp.mean(losses)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return mean_loss(params, jax.tree.map(lambda x: x[None], example))

    params = parameters(module, batch[0][:1])
    chunks, unrolled = spec.chunks, spec.unrolled
    if toy:
        chunks = (2,) if name in TOY_CHUNKS else ()
        unrolled = chunks if unrolled else ()
    return Row(params, mean_loss, loss_fn, batch, size, chunks, unrolled)


def parameters(module: nn.Module, x: jax.Array) -> Any:
    """Draws parameters without compiling an initialiser."""
    dice = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if leaf.ndim > 1:
            scale = math.prod(leaf.shape[:-1]) ** -0.5
            return scale * dice.standard_normal(leaf.shape, np.float32)
        zero = "bias" in jax.tree_util.keystr(path)
        return np.full(leaf.shape, 0 if zero else 1, np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
