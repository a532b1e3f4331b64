"""A small transformer in Flax linen: a label for a text, or its next tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from dp_ilg.experiments.models.linen import masked_mean


def attend(
    queries: Float[Array, "*batch tokens width"],
    keys: Float[Array, "*batch tokens width"],
    values: Float[Array, "*batch tokens width"],
    allowed: Bool[Array, "*#batch tokens tokens"],
    heads: int,
) -> Float[Array, "*batch tokens width"]:
    """Scaled dot-product attention of several heads.

    Args:
        queries: ``[..., tokens, width]``.
        keys: the same shape.
        values: the same shape.
        allowed: ``[..., tokens, tokens]``, whether a row's token may see a column's; a
            row that sees nothing gets the mean of all values.
        heads: divides the width.

    Returns:
        ``[..., tokens, width]``.

    Example:
        >>> x = jnp.ones((3, 4))
        >>> attend(x, x, x, jnp.ones((3, 3), bool), heads=2).shape
        (3, 4)

    Reference:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.
    """
    *rest, width = queries.shape
    split = (*rest, heads, width // heads)
    queries, keys, values = (a.reshape(split) for a in (queries, keys, values))
    scores = jnp.einsum("...qhd,...khd->...hqk", queries, keys)
    scores = scores / (width // heads) ** 0.5
    scores = jnp.where(allowed[..., None, :, :], scores, -1e9)
    shares = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("...hqk,...khd->...qhd", shares, values)
    return mixed.reshape(*rest, width)


def visible(
    ids: Integer[ArrayLike, "*batch tokens"], is_causal: bool
) -> Bool[Array, "*batch tokens tokens"]:
    """Which token may see which: all that are no padding, or all that came before.

    Args:
        ids: ``[..., tokens]``; in a text with a label 0 is padding.
        is_causal: whether a token sees itself and earlier ones only.

    Returns:
        ``[..., tokens, tokens]``: row sees column.

    Example:
        >>> visible(jnp.array([5, 3, 0]), is_causal=True).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        >>> visible(jnp.array([5, 3, 0]), is_causal=False)[0].tolist()
        [True, True, False]
    """
    ids = jnp.asarray(ids)
    square = (*ids.shape, ids.shape[-1])
    if is_causal:
        return jnp.broadcast_to(jnp.tri(ids.shape[-1], dtype=bool), square)
    return jnp.broadcast_to((ids != 0)[..., None, :], square)


def small(stddev: float) -> nn.initializers.Initializer:
    """Kernels `stddev` times as large as those of Flax's dense layers.

    A block that adds little at first leaves the sum of the vectors to the tokens, so
    that small token vectors, whose direction soon turns, are not drowned.

    Args:
        stddev: of the token vectors.

    Returns:
        An initializer.

    Example:
        >>> kernel = small(0.1)(jax.random.key(0), (100, 100))
        >>> 0.009 < float(kernel.std()) < 0.011
        True
    """
    return nn.initializers.variance_scaling(stddev**2, "fan_in", "truncated_normal")


class Block(nn.Module):
    """Attention and a dense layer four times as wide, each normalised first.

    Example:
        >>> x, seen = jnp.ones((1, 3, 4)), jnp.ones((1, 3, 3), bool)
        >>> params = Block(heads=2).init(jax.random.key(0), x, seen)["params"]
        >>> "queries" in params and "narrow" in params
        True
    """

    heads: int
    stddev: float = 1.0

    @nn.compact
    def __call__(self, x, allowed):
        """Maps ``[batch, tokens, width]`` to the same shape."""
        width, init = x.shape[-1], small(self.stddev)
        y = nn.LayerNorm(name="norm_0")(x)
        queries, values = (nn.Dense(width, name=n)(y) for n in ("queries", "values"))
        keys = nn.Dense(width, use_bias=False, name="keys")(y)  # it would do nothing
        parts = (queries, keys, values)
        mix = nn.Dense(width, kernel_init=init, name="mix")
        x = x + mix(attend(*parts, allowed, self.heads))
        y = nn.LayerNorm(name="norm_1")(x)
        y = nn.gelu(nn.Dense(4 * width, name="wide")(y))
        return x + nn.Dense(width, kernel_init=init, name="narrow")(y)


class Transformer(nn.Module):
    """Token and place vectors, blocks, then one label's logits or the next tokens'.

    Example:
        >>> sizes = dict(tokens=9, width=4, depth=1, heads=2, length=6, scale=1.0)
        >>> net = Transformer(**sizes, outputs=9, is_causal=True)
        >>> ids = jnp.ones((2, 6), jnp.int32)
        >>> net.init_with_output(jax.random.key(0), ids)[0].shape
        (2, 6, 9)
    """

    tokens: int
    width: int
    depth: int
    heads: int
    length: int
    outputs: int
    scale: float
    is_causal: bool
    stddev: float = 1.0

    @nn.compact
    def __call__(self, x):
        """Maps ids ``[batch, tokens]`` to logits; only the first `length` are read."""
        ids = x[:, : self.length].astype(jnp.int32)
        embed = nn.initializers.normal(self.stddev)
        embedding = nn.Embed(
            self.tokens, self.width, embedding_init=embed, name="embedding"
        )
        shape = (self.length, self.width)
        near = nn.initializers.normal(0.1 * self.stddev)
        places = self.param("places", near, shape)
        allowed = visible(ids, self.is_causal)
        x = embedding(ids) + places
        for i in range(self.depth):
            x = Block(self.heads, self.stddev, name=f"block_{i}")(x, allowed)
        x = nn.LayerNorm(name="norm")(x)
        if not self.is_causal:
            x = masked_mean(x, ids) * self.scale
        return nn.Dense(self.outputs, name="output")(x)
