"""The transformer of `transformer_linen` in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx

from dp_ilg.experiments.models.linen import masked_mean
from dp_ilg.experiments.models.transformer_linen import attend, small, visible


class Block(nnx.Module):
    """As `dp_ilg.experiments.models.transformer_linen.Block`.

    Example:
        >>> block = Block(4, 2, rngs=nnx.Rngs(0))
        >>> block(jnp.ones((1, 3, 4)), jnp.ones((1, 3, 3), bool)).shape
        (1, 3, 4)
    """

    def __init__(self, width, heads, stddev=1.0, *, rngs):
        self.heads, init = heads, small(stddev)
        self.queries = nnx.Linear(width, width, rngs=rngs)
        self.keys = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.values = nnx.Linear(width, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, kernel_init=init, rngs=rngs)
        self.norm_0 = nnx.LayerNorm(width, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x, allowed):
        """Maps ``[batch, tokens, width]`` to the same shape."""
        y = self.norm_0(x)
        parts = (self.queries(y), self.keys(y), self.values(y))
        x = x + self.mix(attend(*parts, allowed, self.heads))
        return x + self.narrow(jax.nn.gelu(self.wide(self.norm_1(x))))


class Transformer(nnx.Module):
    """As `dp_ilg.experiments.models.transformer_linen.Transformer`.

    Example:
        >>> sizes = dict(tokens=9, width=4, depth=1, heads=2, length=6, outputs=2)
        >>> net = Transformer(**sizes, scale=8.0, is_causal=False, rngs=nnx.Rngs(0))
        >>> net(jnp.ones((3, 6), jnp.int32)).shape
        (3, 2)
    """

    def __init__(
        self,
        *,
        tokens,
        width,
        depth,
        heads,
        length,
        outputs,
        scale,
        is_causal,
        stddev=1.0,
        rngs,
    ):
        embed = nnx.initializers.normal(stddev)
        self.embedding = nnx.Embed(tokens, width, embedding_init=embed, rngs=rngs)
        near = nnx.initializers.normal(0.1 * stddev)
        self.places = nnx.Param(near(rngs.params(), (length, width)))
        self.depth, self.length, self.scale = depth, length, scale
        self.is_causal = is_causal
        for i in range(depth):
            setattr(self, f"block_{i}", Block(width, heads, stddev, rngs=rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        """Maps ids ``[batch, tokens]`` to logits; only the first `length` are read."""
        ids = x[:, : self.length].astype(jnp.int32)
        allowed = visible(ids, self.is_causal)
        x = self.embedding(ids) + self.places[...]
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x, allowed)
        x = self.norm(x)
        if not self.is_causal:
            x = masked_mean(x, ids) * self.scale
        return self.output(x)
