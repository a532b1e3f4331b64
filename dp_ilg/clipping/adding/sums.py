"""Weighted sums over examples in float64, wherever the program itself runs in float32.

A float32 sum over a batch is off by what its other members make it round, and so are
two sums with and without an example. Products of float32 numbers are exact in float64
and their sums are off by 2^-53 of the sizes added: too little to matter for any lot
(docs/sums.md). Only the sums are float64: the loss is differentiated as it was, and
what leaves `clip_sum` is float32 on the public grid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

LONGEST = 1024
"""Terms of one product over examples; longer ones are cut."""
MOST_ROWS = 2048
"""Examples of one sum over formed gradients."""
CANCELLATION = 256.0
"""How much larger than its norm an example's terms may be, added up by size: norms are
made larger where they are more (`clip_sum`), so that sums have a bound."""
LOOKED_UP_BITS = 52
"""Bits of float64 that sums of looked-up rows use."""
_TOGETHER = 8


def wide() -> Any:
    """A context in which float64 exists, also where ``jax_enable_x64`` is off.

    Example:
        >>> with wide():
        ...     str(jnp.zeros(2, "float64").dtype)
        'float64'
    """
    return jax.enable_x64(True)


def widened(value: Any) -> Array:
    """A value as float64, in the context `wide`.

    Example:
        >>> with wide():
        ...     str(widened(jnp.float32(0.5)).dtype)
        'float64'
    """
    return lax.convert_element_type(value, np.dtype(np.float64))


def narrowed(tree: Any, like: Any) -> Any:
    """Float64 sums in the dtypes of a tree, or wider: float32 at least.

    Example:
        >>> with wide():
        ...     narrowed(jnp.ones(2, "float64"), jnp.ones(2, "bfloat16")).dtype
        dtype('float32')
    """
    with wide():
        return jax.tree.map(
            lambda x, y: lax.convert_element_type(
                x, jnp.promote_types(y.dtype, jnp.float32)
            ),
            tree,
            like,
        )


class Weighted(NamedTuple):
    """What is to be added up over examples: ``sum_i weights_i value_i``.

    Attributes:
        weights: float64 ``[examples, ...]``, broadcastable against `value` when axes
            are added at the end; a weight of 0 removes even NaN.
        value: ``[examples, ...]``.
        step: None, or float32, broadcastable against one example: each example's
            product is rounded towards zero to a multiple of it before it is added.
    """

    weights: Array
    value: Array
    step: Any = None


def over_examples(*terms: Weighted) -> list[Array]:
    """Adds up over the examples of one batch, several leaves in one loop.

    Args:
        *terms: one a leaf, all of one batch.

    Returns:
        float64, one a leaf; call this in the context `wide`.

    Example:
        >>> with wide():
        ...     weights = jnp.array([0.5, 0.0], "float64")
        ...     value = jnp.array([[3.0, 5.0], [jnp.nan, 1.0]], "float32")
        ...     both = over_examples(
        ...         Weighted(weights, value), Weighted(weights, value, jnp.float32(1)))
        ...     [x.tolist() for x in both]
        [[1.5, 2.5], [1.0, 2.0]]
    """
    if not terms:
        return []
    filled = [_filled(*term) for term in terms]
    if jax.default_backend() != "cpu":
        return [jnp.sum(_products(*term), axis=0) for term in filled]
    return _added_in_turn(filled)


def _filled(weights: Array, value: Array, step: Any) -> Weighted:
    """Weights with the axes of the values."""
    shape = (*weights.shape, *[1] * (value.ndim - weights.ndim))
    return Weighted(weights.reshape(shape), value, step)


def _products(weights: Array, value: Array, step: Any) -> Array:
    clean = jnp.where(weights != 0, value, jnp.zeros((), value.dtype))
    found = weights * widened(clean)
    if step is None:
        return found
    unit = widened(step)
    return jnp.trunc(found / unit) * unit


def _added_in_turn(terms: list[Weighted]) -> list[Array]:
    """Sums over the first axis, some rows at a time: XLA:CPU reduces it slowly."""
    count = terms[0].value.shape[0]
    start = [jnp.zeros(term.value.shape[1:], np.float64) for term in terms]

    def body(totals: list[Array], pieces: Any) -> tuple[list[Array], None]:
        for k in range(pieces[0][0].shape[0]):
            own = [
                _products(weights[k], value[k], term.step)
                for (weights, value), term in zip(pieces, terms, strict=True)
            ]
            totals = [a + b for a, b in zip(totals, own, strict=True)]
        return totals, None

    arrays = [(term.weights, term.value) for term in terms]
    if count <= _TOGETHER:
        return body(start, arrays)[0] if count else start

    def cut(x: Array) -> Array:
        pad = -count % _TOGETHER
        x = jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) if pad else x
        return x.reshape(-1, _TOGETHER, *x.shape[1:])

    return lax.scan(body, start, jax.tree.map(cut, arrays))[0]


def outer(first: Array, second: Array) -> Array:
    """``sum_t first_t x second_t`` over all terms of all examples.

    Args:
        first: ``[blocks, terms, entries]``.
        second: float64 ``[blocks, terms, entries]``.

    Returns:
        float64 ``[blocks, entries, entries]``; call this in the context `wide`.

    Example:
        >>> with wide():
        ...     two = jnp.ones((1, 3, 2), "float64")
        ...     outer(jnp.ones((1, 3, 1), "float32"), two).tolist()
        [[[3.0, 3.0]]]
    """
    terms = first.shape[1]
    if terms <= LONGEST:
        return _product(first, second)
    count = -(-terms // LONGEST)
    each = -(-terms // count)
    fill = [(0, 0), (0, count * each - terms), (0, 0)]
    pieces = [
        jnp.pad(x, fill).reshape(x.shape[0], count, each, x.shape[2]).swapaxes(0, 1)
        for x in (first, second)
    ]
    start = jnp.zeros((first.shape[0], first.shape[2], second.shape[2]), np.float64)
    add = lambda total, piece: (total + _product(*piece), None)  # noqa: E731
    return lax.scan(add, start, tuple(pieces))[0]


def _product(first: Array, second: Array) -> Array:
    """One product; XLA:CPU is twice as fast if its operands lie as they are read."""
    turned = widened(jnp.swapaxes(first, 1, 2))
    turned, second = lax.optimization_barrier((turned, second))
    return lax.dot_general(turned, second, (((2,), (1,)), ((0,), (0,))))


def looked_up_unit(step: Any, examples: int, parameters: int) -> Array:
    """To what looked-up rows are rounded before they are added, so that sums are exact.

    Args:
        step: of the public grid, float32.
        examples: of one sum.
        parameters: of the whole model.

    Returns:
        float64 powers of two: the smallest for which float64 holds the sum of so many
        examples, each of at most `CANCELLATION` times the bound.

    Example:
        >>> with wide():
        ...     looked_up_unit(jnp.float32(1.0), 16, 10_000).item() == 2.0**-12
        True
    """
    # An example's terms are within CANCELLATION C w < CANCELLATION 2^21 sqrt(n) steps.
    reach = CANCELLATION * 2.0**21 * math.sqrt(parameters) * max(1, examples)
    spare = LOOKED_UP_BITS - math.ceil(math.log2(reach))
    return widened(step) * np.float64(2.0**-spare)
