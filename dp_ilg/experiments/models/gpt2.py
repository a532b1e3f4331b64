"""The GPT-2 network, in Flax linen, at any size: what people fine-tune.

Shape and names follow Radford et al. 2019: learned positions, blocks that are
normalised first, one matrix for query, key and value, a GELU of four times the width,
and a table of words that serves as the output layer too.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer

from dp_ilg.base import Example, LossFn, Params


class Gpt2Size(NamedTuple):
    """Sizes of the network; the defaults are those of GPT-2 small.

    Attributes:
        vocabulary: rows of the table of words.
        context: rows of the table of positions.
        width: of the vectors between blocks.
        depth: number of blocks.
        heads: attention heads of a block.

    Example:
        >>> Gpt2Size().width
        768
    """

    vocabulary: int = 50_257
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12


class _Block(nn.Module):
    size: Gpt2Size

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.size.width
        normed = nn.LayerNorm(epsilon=1e-5, name="ln_1")(x)
        qkv = nn.Dense(3 * width, name="c_attn")(normed)
        x = x + nn.Dense(width, name="c_proj")(_attention(qkv, self.size.heads))
        y = nn.Dense(4 * width, name="c_fc")(nn.LayerNorm(1e-5, name="ln_2")(x))
        return x + nn.Dense(width, name="mlp_proj")(nn.gelu(y))


def _attention(qkv: Array, heads: int) -> Array:
    """Each token's mixture of the tokens up to it."""
    length, width = qkv.shape[-2], qkv.shape[-1] // 3
    parts = jnp.split(qkv.reshape(*qkv.shape[:-1], 3, heads, -1), 3, axis=-3)
    query, key, value = (part.squeeze(-3) for part in parts)
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / (width // heads) ** 0.5
    past = np.tril(np.ones((length, length), bool))
    mixed = jax.nn.softmax(jnp.where(past, scores, -1e9))
    out = jnp.einsum("...hqk,...khd->...qhd", mixed, value)
    return out.reshape(*out.shape[:-2], width)


class Gpt2(nn.Module):
    """Token ids to the scores of each next token.

    Example:
        >>> tiny = Gpt2(Gpt2Size(vocabulary=11, context=8, width=8, depth=1, heads=2))
        >>> variables = tiny.init(jax.random.key(0), jnp.zeros(4, jnp.int32))
        >>> tiny.apply(variables, jnp.arange(4)).shape
        (4, 11)

    Reference: Radford et al. 2019.
    """

    size: Gpt2Size = Gpt2Size()

    @nn.compact
    def __call__(
        self, tokens: Integer[Array, "*batch length"]
    ) -> Float[Array, "*batch length vocabulary"]:
        """Returns logits ``[..., length, vocabulary]``."""
        words = nn.Embed(self.size.vocabulary, self.size.width, name="wte")
        places = nn.Embed(self.size.context, self.size.width, name="wpe")
        x = words(tokens) + places(jnp.arange(tokens.shape[-1]))
        for i in range(self.size.depth):
            x = _Block(self.size, name=f"h{i}")(x)
        return words.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


def gpt2_loss(module: nn.Module) -> LossFn:
    """The mean cross-entropy of one text's next tokens.

    Args:
        module: maps token ids ``[length]`` to logits ``[length, vocabulary]``.

    Returns:
        ``loss_fn(params, tokens)`` for token ids ``[length + 1]`` of one text.

    Privacy: the text is the example: its tokens are protected together.

    Example:
        >>> tiny = Gpt2(Gpt2Size(vocabulary=11, context=8, width=8, depth=1, heads=2))
        >>> params = random_params(tiny, 4)
        >>> float(gpt2_loss(tiny)(params, jnp.arange(5))) > 0
        True
    """

    def loss_fn(params: Params, tokens: Example) -> Array:
        logits: Any = module.apply({"params": params}, tokens[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[1:]
        )
        return losses.mean()

    return loss_fn


def random_params(module: nn.Module, length: int, seed: int = 0) -> Params:
    """Random weights of the published spread, drawn without compiling anything.

    Args:
        module: a network on token ids.
        length: of a text.
        seed: of the draw.

    Returns:
        float32 parameters: matrices with standard deviation 0.02, scales 1, biases 0.

    Example:
        >>> tiny = Gpt2(Gpt2Size(vocabulary=11, context=8, width=8, depth=1, heads=2))
        >>> sum(x.size for x in jax.tree.leaves(random_params(tiny, 4)))
        1040
    """
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    dice = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Array:
        if leaf.ndim > 1:
            drawn = dice.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(np.float32(0.02) * drawn)
        scale = "scale" in jax.tree_util.keystr(path)
        return jnp.full(leaf.shape, 1.0 if scale else 0.0, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
