"""The bundled networks in Flax NNX, and the check that a model is pure."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dp_ilg.base import Params
from dp_ilg.experiments.models.linen import (
    ACTIVATIONS,
    counted_mean,
    masked_mean,
    norm_groups,
)


def nnx_params(module: Any) -> tuple[Any, Params]:
    """Splits an NNX module into its graph and parameters, or refuses it.

    Batch statistics and other mutable state carry one example into another's
    gradient; a dropout layer's random state is not part of the private optimizer's.

    Args:
        module: any ``flax.nnx.Module``.

    Returns:
        The graph definition and the ``nnx.State`` of all ``nnx.Param``.

    Raises:
        ValueError: if there is any other variable, or no parameter.

    Example:
        >>> nnx_params(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        Traceback (most recent call last):
        ValueError: The model holds state besides parameters (BatchStat), through \
which examples change each other's gradients; use layers without it (GroupNorm or \
LayerNorm for BatchNorm, no Dropout).
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    found = jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))
    kinds = sorted({type(variable).__name__ for variable in found})
    if kinds:
        raise ValueError(
            f"The model holds state besides parameters ({', '.join(kinds)}), through "
            "which examples change each other's gradients; use layers without it "
            "(GroupNorm or LayerNorm for BatchNorm, no Dropout)."
        )
    if not jax.tree.leaves(params):
        raise ValueError("The model has no parameters; there is nothing to train.")
    return graph, params


def functions(make: Callable[[Any], Any]) -> tuple[Callable, Callable]:
    """Pure functions of an NNX module: init from a key, apply to a batch.

    Args:
        make: ``nnx.Rngs`` -> module.

    Returns:
        ``init(key) -> params`` and ``apply(params, batch) -> logits``.

    Raises:
        ValueError: as `nnx_params`.

    Example:
        >>> init, apply = functions(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
        >>> apply(init(jax.random.key(0)), jnp.zeros((1, 2))).shape
        (1, 3)
    """
    # The abstract module costs no numbers: its graph is the same for every key.
    graph, _ = nnx_params(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key):
        return nnx_params(make(nnx.Rngs(key)))[1]

    def apply(params, xs):
        return nnx.merge(graph, params)(xs)

    return init, apply


class Mlp(nnx.Module):
    """As `dp_ilg.experiments.models.linen.Mlp`.

    Example:
        >>> sizes = dict(inputs=4, hidden=(8,), outputs=3, activation="tanh")
        >>> Mlp(**sizes, rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 2))).shape
        (1, 3)
    """

    def __init__(self, *, inputs, hidden, outputs, activation, rngs):
        self.act = ACTIVATIONS[activation]
        self.num_hidden = len(hidden)
        sizes = (inputs, *hidden)
        for i, (n, m) in enumerate(zip(sizes, hidden, strict=False)):
            setattr(self, f"hidden_{i}", nnx.Linear(n, m, rngs=rngs))
        self.output = nnx.Linear(sizes[-1], outputs, rngs=rngs)

    def __call__(self, x):
        """Maps ``[batch, ...]`` to logits."""
        x = x.reshape(x.shape[0], -1)
        for i in range(self.num_hidden):
            x = self.act(getattr(self, f"hidden_{i}")(x))
        return self.output(x)


class Linear(nnx.Module):
    """As `dp_ilg.experiments.models.linen.Linear`.

    Example:
        >>> Linear(inputs=4, outputs=3, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 2))).sum()
        Array(0., dtype=float32)
    """

    def __init__(self, *, inputs, outputs, rngs):
        zeros = nnx.initializers.zeros
        self.output = nnx.Linear(inputs, outputs, kernel_init=zeros, rngs=rngs)

    def __call__(self, x):
        """Maps ``[batch, ...]`` to logits."""
        return self.output(x.reshape(x.shape[0], -1).astype(jnp.float32))


class Cnn(nnx.Module):
    """As `dp_ilg.experiments.models.linen.Cnn`.

    Example:
        >>> sizes = dict(image=(28, 28), channels=(16, 32), hidden=(32,), outputs=10)
        >>> net = Cnn(**sizes, activation="tanh", rngs=nnx.Rngs(0))
        >>> net(jnp.zeros((1, 28, 28))).shape
        (1, 10)
    """

    def __init__(self, *, image, channels, hidden, outputs, activation, rngs):
        first, second = channels
        depth = image[2] if len(image) == 3 else 1
        self.image = (*image[:2], depth)
        self.conv_0 = nnx.Conv(
            depth, first, (8, 8), strides=2, padding="SAME", rngs=rngs
        )
        self.conv_1 = nnx.Conv(
            first, second, (4, 4), strides=2, padding="VALID", rngs=rngs
        )
        height, width = (((s + 1) // 2 - 1 - 4) // 2 for s in image[:2])
        self.act = ACTIVATIONS[activation]
        self.head = Mlp(
            inputs=height * width * second,
            hidden=hidden,
            outputs=outputs,
            activation=activation,
            rngs=rngs,
        )

    def __call__(self, x):
        """Maps ``[batch, height, width]`` or with a channel axis to logits."""
        x = x.reshape(x.shape[0], *self.image)
        x = nnx.max_pool(self.act(self.conv_0(x)), (2, 2))
        x = nnx.max_pool(self.act(self.conv_1(x)), (2, 2))
        return self.head(x)


class GroupNormCnn(nnx.Module):
    """As `dp_ilg.experiments.models.linen.GroupNormCnn`.

    Example:
        >>> sizes = dict(image=(32, 32, 3), channels=(8, 16), hidden=(), outputs=10)
        >>> net = GroupNormCnn(**sizes, activation="tanh", rngs=nnx.Rngs(0))
        >>> net(jnp.zeros((1, 32, 32, 3))).shape
        (1, 10)
    """

    def __init__(
        self, *, image, channels, hidden, outputs, activation, rngs, norm_last=False
    ):
        self.num_convs, self.norm_last = len(channels), norm_last
        self.act = ACTIVATIONS[activation]
        for i, (n, m) in enumerate(zip((image[2], *channels), channels, strict=False)):
            setattr(self, f"conv_{i}", nnx.Conv(n, m, (3, 3), rngs=rngs))
            norm = nnx.GroupNorm(m, norm_groups(m), rngs=rngs)
            setattr(self, f"norm_{i}", norm)
        height, width = (side >> len(channels) for side in image[:2])
        inputs = height * width * channels[-1]
        sizes = dict(inputs=inputs, hidden=hidden, outputs=outputs)
        self.head = Mlp(**sizes, activation=activation, rngs=rngs)

    def __call__(self, x):
        """Maps ``[batch, height, width, channels]`` to logits."""
        for i in range(self.num_convs):
            norm = getattr(self, f"norm_{i}")
            x = getattr(self, f"conv_{i}")(x)
            x = norm(self.act(x)) if self.norm_last else self.act(norm(x))
            x = nnx.avg_pool(x, (2, 2), (2, 2))
        return self.head(x)


class MeanEmbedding(nnx.Module):
    """As `dp_ilg.experiments.models.linen.MeanEmbedding`.

    Example:
        >>> sizes = dict(tokens=10, width=2, scale=8.0, hidden=(4,), outputs=1)
        >>> net = MeanEmbedding(**sizes, activation="tanh", rngs=nnx.Rngs(0))
        >>> net(jnp.array([[3, 1, 0, 0]])).shape
        (1, 1)
    """

    def __init__(
        self,
        *,
        tokens,
        width,
        scale,
        hidden,
        outputs,
        activation,
        rngs,
        stddev=1.0,
        counted=False,
    ):
        self.counted = counted
        normal = nnx.initializers.normal(stddev)
        self.embedding = nnx.Embed(tokens, width, embedding_init=normal, rngs=rngs)
        self.scale = scale
        self.head = Mlp(
            inputs=width,
            hidden=hidden,
            outputs=outputs,
            activation=activation,
            rngs=rngs,
        )

    def __call__(self, x):
        """Maps ids ``[batch, length]`` (0 is padding) or counts to logits."""
        if self.counted:
            mean = counted_mean(self.embedding.embedding[...], x)
        else:
            mean = masked_mean(self.embedding(x.astype(jnp.int32)), x)
        return self.head(mean * self.scale)


class Tabular(nnx.Module):
    """As `dp_ilg.experiments.models.linen.Tabular`.

    Example:
        >>> sizes = dict(categories=(3, 5), numbers=1, width=2, hidden=(4,), outputs=2)
        >>> net = Tabular(**sizes, activation="tanh", rngs=nnx.Rngs(0))
        >>> net((jnp.array([[2, 4]]), jnp.zeros((1, 1)))).shape
        (1, 2)
    """

    def __init__(
        self, *, categories, numbers, width, hidden, outputs, activation, rngs
    ):
        self.num_columns = len(categories)
        for i, count in enumerate(categories):
            setattr(self, f"column_{i}", nnx.Embed(count, width, rngs=rngs))
        self.head = Mlp(
            inputs=width * len(categories) + numbers,
            hidden=hidden,
            outputs=outputs,
            activation=activation,
            rngs=rngs,
        )

    def __call__(self, x):
        """Maps (categories ``[batch, columns]``, numbers ``[batch, k]``) to logits."""
        ids, numbers = x
        parts = [
            getattr(self, f"column_{i}")(ids[:, i].astype(jnp.int32))
            for i in range(self.num_columns)
        ]
        return self.head(jnp.concatenate([*parts, numbers], axis=-1))
