"""Scales what uses read and gave, so that nothing finite over- or underflows.

Each array is divided by the power of two below its largest entry, example by example,
which rounds nothing; an example with NaN or infinity becomes zeros and a NaN norm (law:
zero is absent).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.geometry.groups import accumulator
from dp_ilg.geometry.rounding import power_of_two


class Pair(NamedTuple):
    """What a use read, and the derivative at its output, ``[examples, ...]`` each."""

    read: Any
    cotangent: Array


def scaled(pairs: list[list[Pair]]) -> tuple[list[list[Pair]], Array]:
    """Scales what every use of every part read and gave.

    Each is divided by `_largest` of it, and the second of a pair by what its use
    falls short of the largest use of its part, so that one scale a part is left.

    Args:
        pairs: the uses of every part.

    Returns:
        The scaled pairs, and ``[examples, parts]``, what their product was divided
        by: NaN for an example that is not finite, 0 for one that is all zeros.
    """
    uses = [pair for own in pairs for pair in own]
    owners = np.repeat(np.arange(len(pairs)), [len(own) for own in pairs])
    reads = {id(pair.read): pair.read for pair in uses}
    place = {key: k for k, key in enumerate(reads)}
    shared = np.array([place[id(pair.read)] for pair in uses])
    ones = jnp.stack([_largest(x) for x in reads.values()], axis=1)
    twos = jnp.stack([_largest(pair.cotangent) for pair in uses], axis=1)
    sizes = _product(ones[:, shared], twos)
    scale = jnp.stack([jnp.max(sizes[:, owners == k], 1) for k in range(len(pairs))], 1)
    tiny = jnp.finfo(scale.dtype).tiny
    known = scale * tiny < 1
    present = known & (scale >= tiny)
    share = sizes / jnp.where(present, scale, 1)[:, owners]
    share = jnp.where(present[:, owners], share, 0)
    normal = (ones * tiny < 1) & (ones >= tiny)
    one = jnp.where(normal, 1 / ones, 0)
    two = jnp.where(share > 0, share / twos, 0)
    read = [_times(x, one[:, k]) for k, x in enumerate(reads.values())]
    out = [
        Pair(read[shared[k]], _times(pair.cotangent, two[:, k]))
        for k, pair in enumerate(uses)
    ]
    ends = np.cumsum([0, *[len(own) for own in pairs]])
    split = [out[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return split, jnp.where(present, scale, jnp.where(known, 0, jnp.nan))


def _largest(value: Array) -> Array:
    """Power of two below the largest entry of every example; 1 for row numbers."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.ones(value.shape[0], jnp.float32)
    top = jnp.max(jnp.abs(value), axis=range(1, value.ndim), initial=0)
    return power_of_two(top.astype(accumulator(value.dtype)))


def _product(one: Array, two: Array) -> Array:
    """Largest entry of a use's terms: 0 where a factor is denormal, else NaN-safe."""
    product = one * two
    tiny = jnp.finfo(product.dtype).tiny
    product = jnp.where((one * tiny < 1) & (two * tiny < 1), product, jnp.nan)
    return jnp.where((one < tiny) | (two < tiny), 0 * product, product)


def _times(value: Array, factor: Array) -> Array:
    """The factor, scaled; zeros where its scale is 0, whatever it holds."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    wide = value.astype(accumulator(value.dtype))
    factor = factor.reshape(-1, *[1] * (value.ndim - 1)).astype(wide.dtype)
    return jnp.where(factor > 0, wide * factor, 0)
