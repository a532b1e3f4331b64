"""The bundled networks in Flax linen, and the check that a model is pure."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from dp_ilg.base import Params

ACTIVATIONS: dict[str, Callable] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
}


def linen_params(variables: Mapping[str, Any]) -> Params:
    """Takes the parameters out of linen's variables, or refuses the model.

    Batch statistics and other mutable collections carry one example into another's
    gradient, so that clipping no longer bounds what one example changes.

    Args:
        variables: what ``module.init`` returned.

    Returns:
        The collection "params".

    Raises:
        ValueError: if there is any other collection, or no parameter.

    Example:
        >>> linen_params({"params": {"w": 1.0}, "batch_stats": {}})
        Traceback (most recent call last):
        ValueError: The model has the mutable collection batch_stats, through which \
examples change each other's gradients; use layers without one (GroupNorm or \
LayerNorm for BatchNorm).
    """
    others = sorted(name for name in variables if name != "params")
    if others:
        raise ValueError(
            f"The model has the mutable collection {', '.join(others)}, through which "
            "examples change each other's gradients; use layers without one "
            "(GroupNorm or LayerNorm for BatchNorm)."
        )
    if not jax.tree.leaves(dict(variables)):
        raise ValueError("The model has no parameters; there is nothing to train.")
    return variables["params"]


def masked_mean(
    embedded: Float[ArrayLike, "*batch tokens width"],
    ids: Integer[ArrayLike, "*batch tokens"],
) -> Float[Array, "*batch width"]:
    """Mean of token vectors over the real tokens; id 0 is padding.

    Args:
        embedded: ``[..., tokens, width]``.
        ids: ``[..., tokens]``.

    Returns:
        ``[..., width]``; zero for a text of padding only.

    Example:
        >>> masked_mean(jnp.ones((3, 2)), jnp.array([5, 7, 0]))
        Array([1., 1.], dtype=float32)
    """
    real = (jnp.asarray(ids) != 0).astype(jnp.asarray(embedded).dtype)
    total = jnp.einsum("...tw,...t->...w", embedded, real)
    return total / jnp.maximum(real.sum(-1), 1.0)[..., None]


def counted_mean(
    table: Float[ArrayLike, "tokens width"], counts: Integer[ArrayLike, "*batch tokens"]
) -> Float[Array, "*batch width"]:
    """Mean of token vectors over the tokens of a text, of which the counts are known.

    Args:
        table: ``[tokens, width]``.
        counts: ``[..., tokens]``.

    Returns:
        ``[..., width]``; zero for a text without tokens.

    Example:
        >>> counted_mean(jnp.array([[9.0], [1.0], [4.0]]), jnp.array([0, 2, 1]))
        Array([2.], dtype=float32)
    """
    counts = jnp.asarray(counts).astype(jnp.asarray(table).dtype)
    return (counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)) @ table


def norm_groups(channels: int) -> int:
    """How many groups GroupNorm has: up to 8, dividing the channels.

    Args:
        channels: of the layer before.

    Returns:
        The number of groups.

    Example:
        >>> norm_groups(32), norm_groups(12)
        (8, 4)
    """
    return math.gcd(channels, 8)


class _Head(nn.Module):
    """Hidden dense layers and the output; submodules of whoever holds it."""

    hidden: tuple[int, ...]
    outputs: int
    activation: str

    def dense(self, x: Any) -> Any:
        act = ACTIVATIONS[self.activation]
        for i, size in enumerate(self.hidden):
            x = act(nn.Dense(size, name=f"hidden_{i}")(x))
        return nn.Dense(self.outputs, name="output")(x)


class Mlp(_Head):
    """Flattened input, hidden layers, logits.

    Example:
        >>> mlp = Mlp(hidden=(8,), outputs=3, activation="tanh", inputs=4)
        >>> sorted(mlp.init(jax.random.key(0), jnp.zeros((1, 2, 2)))["params"])
        ['hidden_0', 'output']
    """

    inputs: int = 0

    @nn.compact
    def __call__(self, x):
        """Maps ``[batch, ...]`` to logits."""
        return self.dense(x.reshape(x.shape[0], -1))


class Linear(nn.Module):
    """Softmax regression on the flattened input, from zero: the loss is convex.

    Example:
        >>> net = Linear(inputs=4, outputs=3)
        >>> params = net.init(jax.random.key(0), jnp.zeros((1, 2, 2)))["params"]
        >>> params["output"]["kernel"].shape
        (4, 3)
    """

    inputs: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        """Maps ``[batch, ...]`` to logits."""
        zeros = nn.initializers.zeros
        x = x.reshape(x.shape[0], self.inputs).astype(jnp.float32)
        return nn.Dense(self.outputs, kernel_init=zeros, name="output")(x)


class Cnn(_Head):
    """The small convolutional net of the DP literature, 26,010 parameters on MNIST.

    Example:
        >>> cnn = Cnn((32,), 10, "tanh", image=(28, 28), channels=(16, 32))
        >>> params = cnn.init(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
        >>> sum(p.size for p in jax.tree.leaves(params))
        26010

    Reference:
        Papernot, Thakurta, Song, Chien, Erlingsson, "Tempered Sigmoid Activations
        for Deep Learning with Differential Privacy", AAAI 2021.
    """

    image: tuple[int, ...] = ()
    channels: tuple[int, ...] = (16, 32)

    @nn.compact
    def __call__(self, x):
        """Maps ``[batch, height, width]`` or with a channel axis to logits."""
        act = ACTIVATIONS[self.activation]
        x = x.reshape(x.shape[0], *self.image, *(() if x.ndim == 4 else (1,)))
        first, second = self.channels
        x = act(nn.Conv(first, (8, 8), 2, padding="SAME", name="conv_0")(x))
        x = nn.max_pool(x, (2, 2))
        x = act(nn.Conv(second, (4, 4), 2, padding="VALID", name="conv_1")(x))
        x = nn.max_pool(x, (2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


class GroupNormCnn(_Head):
    """3 x 3 convolutions, each with GroupNorm, activation and a halving mean pool.

    With `norm_last` the activation comes before GroupNorm.

    Example:
        >>> net = GroupNormCnn((), 10, "tanh", image=(32, 32, 3), channels=(8, 16))
        >>> params = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        >>> sorted(params)
        ['conv_0', 'conv_1', 'norm_0', 'norm_1', 'output']

    Reference:
        De, Berrada, Hayes, Smith, Balle, "Unlocking High-Accuracy Differentially
        Private Image Classification through Scale", 2022, on GroupNorm.
    """

    image: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    norm_last: bool = False

    @nn.compact
    def __call__(self, x):
        """Maps ``[batch, height, width, channels]`` to logits."""
        act = ACTIVATIONS[self.activation]
        for i, size in enumerate(self.channels):
            norm = nn.GroupNorm(norm_groups(size), name=f"norm_{i}")
            x = nn.Conv(size, (3, 3), name=f"conv_{i}")(x)
            x = norm(act(x)) if self.norm_last else act(norm(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


class MeanEmbedding(_Head):
    """Token vectors, their mean over the real tokens times `scale`, dense layers.

    Example:
        >>> net = MeanEmbedding((4,), 1, "tanh", tokens=10, width=2, scale=8.0)
        >>> ids = jnp.array([[3, 1, 0, 0]])
        >>> net.init(jax.random.key(0), ids)["params"]["embedding"]["embedding"].shape
        (10, 2)
    """

    tokens: int = 0
    width: int = 16
    scale: float = 8.0
    stddev: float = 1.0
    counted: bool = False

    @nn.compact
    def __call__(self, x):
        """Maps ids ``[batch, length]`` (0 is padding) or counts to logits."""
        normal = nn.initializers.normal(self.stddev)
        embed = nn.Embed(
            self.tokens, self.width, embedding_init=normal, name="embedding"
        )
        if self.counted:
            mean = counted_mean(embed.embedding, x)
        else:
            mean = masked_mean(embed(x.astype(jnp.int32)), x)
        return self.dense(mean * self.scale)


class Tabular(_Head):
    """Categorical columns embedded, joined to the numbers, dense layers.

    Example:
        >>> net = Tabular((4,), 2, "tanh", categories=(3, 5), numbers=1, width=2)
        >>> x = (jnp.array([[2, 4]]), jnp.zeros((1, 1)))
        >>> sorted(net.init(jax.random.key(0), x)["params"])
        ['column_0', 'column_1', 'hidden_0', 'output']
    """

    categories: tuple[int, ...] = ()
    numbers: int = 0
    width: int = 8

    @nn.compact
    def __call__(self, x):
        """Maps (categories ``[batch, columns]``, numbers ``[batch, k]``) to logits."""
        ids, numbers = x
        parts = [
            nn.Embed(count, self.width, name=f"column_{i}")(ids[:, i].astype(jnp.int32))
            for i, count in enumerate(self.categories)
        ]
        return self.dense(jnp.concatenate([*parts, numbers], axis=-1))
