"""What rounding can do to a sum, at worst, and sums to which it can do little.

Every bound holds for any order of the additions inside a chunk, with fused products or
without, and where a device flushes denormals. docs/rounding.md derives them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

CHUNK = 32
"""About how many entries are added in an order that the compiler may choose."""
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
    while count > 2 * CHUNK:
        width = _divisor(count, CHUNK, (CHUNK // 2, 2 * CHUNK))
        widths.append(width)
        count = math.ceil(count / width)
    return (*widths, max(count, 1))


def additions(count: int) -> int:
    """Through how many additions an entry goes at most in `total` of so many.

    Example:
        >>> additions(64), additions(10**6)
        (64, 132)
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


class Gram(NamedTuple):
    """Inner products of terms, and how wrong they may be.

    Attributes:
        values: ``[examples, batch, terms, terms]``.
        roundings: of the product of two terms' norms, in a value.
        flushed: what products of denormals may have taken from a value.
    """

    values: Array
    roundings: int
    flushed: float

    def errors(self) -> tuple[Array, Array]:
        """Norms of the terms, and the error of every value, from above."""
        bound = gamma(self.roundings, self.values.dtype)
        square = jnp.maximum(jnp.diagonal(self.values, axis1=2, axis2=3), 0)
        size = upwards(jnp.sqrt((square + self.flushed) * (1 + bound)), 4)
        error = bound * size[..., :, None] * size[..., None, :] + self.flushed
        return size, error


def pair_squares(first: Gram, second: Gram) -> tuple[Array, Array, Array]:
    """What each term adds to the squared norm of a sum of products of terms.

    docs/rounding.md, "Gram products": the errors of one factor's products count by
    what the other's have come out as, which is little where terms are unlike.

    Args:
        first: inner products of the first factors.
        second: of the second ones.

    Returns:
        Shares of the square, their errors, and norms of the terms, from above, each
        ``[examples, batch, terms]``.

    Example:
        >>> import jax.numpy as jnp
        >>> one = Gram(jnp.full((1, 1, 1, 1), 9.0), 2, 0.0)
        >>> two = Gram(jnp.full((1, 1, 1, 1), 4.0), 2, 0.0)
        >>> square, error, size = pair_squares(one, two)
        >>> float(square[0, 0, 0]), bool(0 < error[0, 0, 0] < 1e-4)
        (36.0, True)
    """
    (one, wrong), (two, faulty) = first.errors(), second.errors()
    a, b = jnp.abs(first.values), jnp.abs(second.values)
    terms, dtype = a.shape[2], a.dtype
    bound = gamma(2 * additions(terms) + additions(a.shape[1]) + 2, dtype)
    error = b * wrong + (a + wrong) * faulty + bound * a * b
    error = jnp.sum(error, axis=3) + terms * float(jnp.finfo(dtype).tiny)
    return total(first.values * second.values), error, one * two


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
