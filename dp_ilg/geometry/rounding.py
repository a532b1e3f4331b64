"""What rounding can do to a sum, at worst, and sums to which it can do little.

Every bound holds for any order of the additions inside a chunk, with fused products or
without, and where a device flushes denormals. docs/rounding.md derives them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

CHUNKS = ((4096, 32), (16, 8))
"""From how many entries on, how many are added in an order the compiler may choose."""
BLOCK = 64
"""About how many entries of two terms are multiplied and added in one product."""
_BITS = {"float32": (jnp.uint32, 0x7F800000), "float64": (jnp.uint64, 0x7FF0 << 48)}


def unit(dtype: Any = jnp.float32) -> float:
    """The unit roundoff u of a dtype: 2^-24 in float32.

    Example:
        >>> unit() == 2.0**-24
        True
    """
    return float(jnp.finfo(dtype).eps) / 2


def gamma(roundings: float, dtype: Any = jnp.float32) -> float:
    """Higham's ``gamma_n = n u / (1 - n u)``: what n roundings in a row can change.

    Args:
        roundings: how many, n.
        dtype: in which they happen.

    Returns:
        The relative bound; a Python number, for it follows from shapes.

    Raises:
        ValueError: where n u reaches 1/2 and nothing sure is left.

    Example:
        >>> round(gamma(32) / 2.0**-24, 3)
        32.0

    Reference: Higham 2002, Accuracy and Stability of Numerical Algorithms, Lemma 3.1.
    """
    share = roundings * unit(dtype)
    if share >= 0.5:
        raise ValueError(
            f"A sum with {roundings:.3g} roundings in a row has no bound in "
            f"{jnp.dtype(dtype).name}; split the parameter into smaller leaves."
        )
    return share / (1 - share)


def _divisor(count: int, about: int, within: tuple[int, int]) -> int:
    """A divisor near a width, so that nothing has to be copied; else the width."""
    fits = [w for w in range(within[0], within[1] + 1) if count % w == 0]
    return min(fits, key=lambda w: abs(w - about), default=about)


@functools.cache
def _widths(count: int) -> tuple[int, ...]:
    """Widths of the chunks of `total`, stage by stage."""
    widths = []
    while fitting := [width for least, width in CHUNKS if count > least]:
        width = _divisor(count, fitting[0], (fitting[0] // 2, 2 * fitting[0]))
        widths.append(width)
        count = math.ceil(count / width)
    return (*widths, max(count, 1))


def additions(count: int) -> int:
    """Through how many additions an entry goes at most in `total` of so many.

    Example:
        >>> additions(64), additions(10**6)
        (16, 82)
    """
    return sum(_widths(count))


def total(values: Float[Array, "*lead entries"]) -> Float[Array, "*lead"]:
    """Sum over the last axis in stages, each of few entries.

    A plain sum may go through all entries one after the other, whose bound is the
    count. Here it is the sum of a few widths, `additions`. Between the stages stands
    what no compiler may move a sum across: infinity becomes NaN.

    Args:
        values: what to add.

    Returns:
        The sums; NaN where a sum of a chunk is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> float(total(jnp.ones(1000)))
        1000.0
    """
    for width in _widths(values.shape[-1])[:-1]:
        whole = values.shape[-1] // width
        head = values[..., : whole * width]
        sums = jnp.sum(head.reshape(*head.shape[:-1], whole, width), axis=-1)
        if values.shape[-1] > whole * width:
            rest = jnp.sum(values[..., whole * width :], axis=-1, keepdims=True)
            sums = jnp.concatenate([sums, rest], axis=-1)
        values = jnp.where(jnp.isfinite(sums), sums, jnp.nan)
    return jnp.sum(values, axis=-1)


def inner_roundings(width: int, terms: int) -> int:
    """Through how many roundings an entry goes in `inner_products`, and in `total`.

    Example:
        >>> inner_roundings(768, 16), inner_roundings(40, 16)
        (69, 41)
    """
    if terms == 1:
        return additions(width) + 1
    if width <= BLOCK:
        return width + 1
    blocks = math.ceil(width / _block(width))
    tree = _block(width) + math.ceil(math.log2(blocks))
    return max(tree, additions(width)) + 1


def inner_products(
    x: Float[Array, "examples batch terms entries"],
    y: Float[Array, "examples batch others entries"],
) -> Float[Array, "examples batch terms others"]:
    """Inner products of all terms, block by block: few roundings are in a row.

    Args:
        x: terms.
        y: terms.

    Returns:
        The products; wrong by ``gamma(inner_roundings)`` of the norms at most.

    Example:
        >>> import jax.numpy as jnp
        >>> inner_products(jnp.ones((1, 1, 2, 100)), jnp.ones((1, 1, 2, 100))).tolist()
        [[[[100.0, 100.0], [100.0, 100.0]]]]
    """
    exact = lax.Precision.HIGHEST
    if x.shape[3] <= BLOCK:
        return jnp.einsum("bgta,bgsa->bgts", x, y, precision=exact)
    one, two = (_in_blocks(z, _block(z.shape[3])) for z in (x, y))
    found = jnp.einsum("bgkta,bgksa->bgkts", one, two, precision=exact)
    parts = [found[:, :, k] for k in range(found.shape[2])]
    while len(parts) > 1:
        added = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = added + (parts[-1:] if len(parts) % 2 else [])
    return parts[0]


def _block(width: int) -> int:
    return _divisor(width, BLOCK, (BLOCK // 2, 3 * BLOCK // 2))


def _in_blocks(x: Array, block: int) -> Array:
    """``[examples, batch, blocks, terms, block]``, filled up with zeros."""
    *lead, terms, width = x.shape
    count = math.ceil(width / block)
    if count * block > width:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, count * block - width)))
    return jnp.moveaxis(x.reshape(*lead, terms, count, block), 3, 2)


def upwards(value: Array, roundings: float) -> Array:
    """`value` with what so many roundings may have taken from it, and not below.

    Example:
        >>> import jax.numpy as jnp
        >>> bool(1 < upwards(jnp.ones(()), 4) < 1 + 1e-6)
        True
    """
    return value * np.asarray(1 + gamma(roundings + 3, value.dtype), value.dtype)


def power_of_two(size: Array) -> Array:
    """The largest power of two that is no larger: to divide by it rounds nothing.

    Args:
        size: float32 or float64, not negative.

    Returns:
        The power; 0 for zero and denormal numbers, infinity for what is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> power_of_two(jnp.array([1.0, 3.0, 0.3])).tolist()
        [1.0, 2.0, 0.25]
    """
    kind, mask = _BITS[size.dtype.name]
    bits = lax.bitcast_convert_type(size, kind) & np.asarray(mask, kind)
    return lax.bitcast_convert_type(bits, size.dtype)


def weighted_norm_rounding(groups: int, dtype: Any = jnp.float32) -> float:
    """How much too small `weighted_norm` of so many groups can be, relative.

    Two roundings in every quotient, one in its square, `additions` in their sum, half
    of which reach the root; the root and the last product have one each.

    Example:
        >>> 5 * unit() < weighted_norm_rounding(4) < 9 * unit()
        True
    """
    return gamma((additions(groups) + 1) / 2 + 5, dtype)
