"""The weighted sum over examples of one part of a parameter, in float64.

The factors and gradients come scaled (see `bookkeeping.magnitudes`), the weights with
their scale. All is called in the context `sums.wide`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.clipping.adding.sums import Weighted, outer, over_examples, widened
from dp_ilg.clipping.bookkeeping.factors import Factors
from dp_ilg.clipping.bookkeeping.parts import Part
from dp_ilg.clipping.bookkeeping.rules import Rows


def sum_of_gradients(part: Part, values: Array, weights: Array) -> Array:
    """``sum_b weights_b gradient_b``, shaped as one gradient, in float64.

    Args:
        part: the part.
        values: scaled gradients; ``[examples, batch, first, second]`` if it is cut.
        weights: float64 ``[examples]`` or ``[examples, groups]``, scale included.

    Returns:
        The sum; call this in the context `dp_ilg.clipping.adding.sums.wide`.
    """
    if weights.ndim == 2 and not part.side.name:
        weights = weights[:, part.side.groups[0]]
    if weights.ndim == 2:
        weights = _spread(part, weights, True)
    return over_examples(Weighted(weights, values))[0]


def sum_of_factors(
    part: Part, factors: Factors, weights: Array, units: Any = None
) -> Array:
    """The same from the factors, ``[batch, first, second]``.

    Args:
        part: the part.
        factors: its scaled factors.
        weights: float64 ``[examples]`` or ``[examples, groups]``, scale included.
        units: to what terms of looked-up rows are rounded, float64 ``[groups]``, or
            None for no rounding.

    Returns:
        The sum; call this in the context `dp_ilg.clipping.adding.sums.wide`.
    """
    pairs = zip(factors.firsts, factors.seconds, strict=True)
    sums = [_sum_of_use(part, *pair, weights, units) for pair in pairs]
    return functools.reduce(jnp.add, sums)


def _sum_of_use(
    part: Part, first: Any, second: Any, weights: Array, units: Any
) -> Array:
    flipped = {"first": "second", "second": "first"}
    side = part.side.name
    if isinstance(second, Rows):
        side = flipped.get(side, side)
        scale = _row_weights(part, second, weights, side)
        unit = None if units is None else _row_weights(part, second, units[None], side)
        return jnp.swapaxes(_scatter(second, first, scale, unit), 1, 2)
    if isinstance(first, Rows):
        scale = _row_weights(part, first, weights, side)
        unit = None if units is None else _row_weights(part, first, units[None], side)
        return _scatter(first, second, scale, unit)
    if weights.ndim == 1 or side in ("", "batch", "second"):
        second = widened(second) * _spread(part, weights, False)
    else:
        first, second = second, widened(first) * _spread(part, weights, False)
        return jnp.swapaxes(_outer_of_batch(first, second), 1, 2)
    return _outer_of_batch(first, second)


def _outer_of_batch(first: Array, second: Array) -> Array:
    """Terms of all examples in one axis, and their products added up."""
    one, two = (
        jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[3])
        for x in (first, second)
    )
    return outer(one, two)


def _spread(part: Part, weights: Array, formed: bool) -> Array:
    """Weights as an array that broadcasts against factors or formed gradients."""
    if weights.ndim == 1:
        return weights[:, None, None, None]
    if not part.side.name:
        return weights[:, part.side.groups[0]][:, None, None, None]
    chosen = weights[:, part.side.labels]
    if part.side.name == "batch":
        return chosen[:, :, None, None]
    if part.side.name == "first" and formed:
        return chosen[:, None, :, None]
    return chosen[:, None, None, :]


def _row_weights(part: Part, rows: Rows, weights: Array, side: str) -> Array:
    """Weights ``[examples]`` or ``[examples or 1, groups]`` for terms of rows."""
    if weights.ndim == 1 or side != "first":
        return _spread(part, weights, False)
    labels = jnp.asarray(part.side.labels)[rows.ids]
    table = jnp.broadcast_to(weights, (labels.shape[0], weights.shape[1]))
    return jnp.take_along_axis(table[:, None, :], labels, axis=2)[..., None]


def _scatter(rows: Rows, value: Array, scale: Array, unit: Any) -> Array:
    """Adds the terms to their rows, ``[batch, rows, entries]``.

    Each is rounded to its unit before: then no order of the additions rounds.
    """
    value = widened(value) * scale
    if unit is not None:
        value = jnp.round(value / unit) * unit
    blocks = value.shape[1]
    number = jnp.arange(blocks, dtype=np.int32)[None, :, None]
    zeros = jnp.zeros((blocks, rows.size, value.shape[3]), value.dtype)
    number = jnp.broadcast_to(number, rows.ids.shape)
    return zeros.at[number, rows.ids].add(value)
