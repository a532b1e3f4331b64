"""Norms and sums of gradients in factors, without or with forming them.

The factors come scaled (see `magnitudes`). Squared norms come from Gram products of
the terms, ``sum_ts <first_t, first_s> <second_t, second_s>``, or from the gradient
itself, formed once and used again for the sum: whichever is cheaper by static shapes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.few import MOST, SPARE_SIZE, squares_of_few
from dp_ilg.clipping.bookkeeping.parts import ERROR_MARGIN, Part, Square
from dp_ilg.clipping.bookkeeping.rows import FEWEST, squares_of_rows
from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.geometry.groups import accumulator
from dp_ilg.geometry.rounding import (
    Gram,
    additions,
    gamma,
    inner_products,
    inner_roundings,
    pair_squares,
    total,
    upwards,
)

_EXACT = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """The factors of one part for a batch, scaled.

    Attributes:
        firsts: one array ``[examples, batch, terms, first]`` or `Rows` a use.
        seconds: the same for the second factor.
    """

    firsts: list[Any]
    seconds: list[Any]


def joined(uses: list[tuple[Any, Any]]) -> Factors:
    """The factors of all uses of a part, their terms in one where they are alike."""
    firsts, seconds = ([_floating(pair[k]) for pair in uses] for k in (0, 1))
    one, other = _joined(firsts), _joined(seconds)
    if len(one) != len(other):
        return Factors(firsts, seconds)
    return Factors(one, other)


def _floating(value: Any) -> Any:
    """Numbers as floats: products of what a loss reads as integers may overflow."""
    if isinstance(value, Rows):
        return value
    return value.astype(accumulator(value.dtype))


def _joined(values: list[Any]) -> list[Any]:
    """Joins the terms of several uses where all or none are in rows."""
    if len(values) == 1 or len({isinstance(x, Rows) for x in values}) > 1:
        return values
    if isinstance(values[0], Rows):
        ids = jnp.concatenate([x.ids for x in values], axis=2)
        return [Rows(ids, values[0].size)]
    return [jnp.concatenate(values, axis=2)]


def gradients(factors: Factors) -> Array:
    """The scaled gradients themselves, ``[examples, batch, first, second]``."""
    (first,), (second,) = factors.firsts, factors.seconds
    return jnp.einsum("bgta,bgtc->bgac", first, second, precision=_EXACT)


def squares_of_gradients(part: Part, values: Array) -> list[Square]:
    """Squared norm of every piece, ``[examples]``, from the scaled gradients."""
    axes = {"batch": 1, "first": 2, "second": 3}
    out = []
    for group in part.side.groups:
        own = values
        if part.side.name:
            axis = axes[part.side.name]
            own = _take(values, np.flatnonzero(part.side.labels == group), axis)
        flat = own.reshape(own.shape[0], math.prod(own.shape[1:]))
        square = total(jnp.square(flat))
        width, tiny = flat.shape[1], float(jnp.finfo(flat.dtype).tiny)
        error = gamma(additions(width) + 1, flat.dtype) * square + width * tiny
        out.append(Square(square, ERROR_MARGIN * error))
    return out


def squares_of_factors(part: Part, factors: Factors) -> list[Square]:
    """The same from Gram products of the terms, and what bounds their rounding.

    Where terms cancel, rounding may exceed what is left; a bound on it is added in
    `norms`, so that no norm comes out too small.
    """
    found = _lookup(part, factors) or _few(part, factors) or _grams(part, factors)
    if 2 < part.terms <= MOST and not part.has_rows:
        found = [
            _smaller(*both) for both in zip(found, _grams(part, factors), strict=True)
        ]
    return found


def _grams(part: Part, factors: Factors) -> list[Square]:
    """The squares of any part, from inner products of all pairs of its terms."""
    side = part.side
    if not side.name:
        return [_total(*pair_squares(_gram(factors.firsts), _gram(factors.seconds)))]
    if side.name == "batch":
        value, error, sizes = pair_squares(
            _gram(factors.firsts), _gram(factors.seconds)
        )
        chosen = [np.flatnonzero(side.labels == g) for g in side.groups]
        return [
            _total(*(_take(x, i, 1) for x in (value, error, sizes))) for i in chosen
        ]
    cut, other = factors.firsts, factors.seconds
    if side.name == "second":
        cut, other = other, cut
    rest = _gram(other)
    if all(isinstance(x, Rows) for x in cut):
        return _by_row(part, cut, rest)
    return [
        _total(*pair_squares(_gram(cut, np.flatnonzero(side.labels == g)), rest))
        for g in side.groups
    ]


def _smaller(one: Square, other: Square) -> Square:
    """The lower of two upper bounds of one square."""
    better = one.value + one.error <= other.value + other.error
    value = jnp.where(better, one.value, other.value)
    return Square(value, jnp.where(better, one.error, other.error), other.size)


def _lookup(part: Part, factors: Factors) -> list[Square] | None:
    """The squares of a part that is one lookup of many rows."""
    if len(factors.firsts) > 1 or not part.has_rows or part.terms < FEWEST:
        return None
    (first,), (second,) = factors.firsts, factors.seconds
    names = {"first": "rows", "second": "entries"}
    if isinstance(second, Rows):
        first, second = second, first
        names = {"second": "rows", "first": "entries"}
    side = names.get(part.side.name, part.side.name)
    return squares_of_rows(part, first, second, side)


def _few(part: Part, factors: Factors) -> list[Square] | None:
    """The squares of a part that is a sum of few products."""
    if len(factors.firsts) > 1 or part.terms < 2:
        return None
    (first,), (second,) = factors.firsts, factors.seconds
    return squares_of_few(part.side, first, second)


def _by_row(part: Part, rows: list[Any], rest: Gram) -> list[Square]:
    """Pieces of one-hot factors: each term belongs to the piece of its row."""
    found = pair_squares(_gram(rows), rest)
    labels = jnp.asarray(part.side.labels)
    owner = jnp.concatenate([labels[x.ids] for x in rows], axis=2)
    return [
        _total(*(jnp.where(owner == group, x, 0) for x in found))
        for group in part.side.groups
    ]


def _total(value: Array, error: Array, sizes: Array) -> Square:
    """Adds up what the terms contribute."""
    count = sizes.shape[1:]
    error = gamma(4 * math.prod(count) + 40, error.dtype) * error + error
    size = None
    if count[1] > 1:
        alike = jnp.sum(jnp.square(jnp.sum(sizes, axis=2)), axis=1)
        size = SPARE_SIZE * alike
    return Square(total(total(value)), jnp.sum(error, axis=(1, 2)), size)


def norms(squares: list[Square], scale: Array) -> tuple[Array, Array]:
    """Norms and sizes of all pieces, ``[examples, pieces]`` each.

    Args:
        squares: scaled squares with their errors.
        scale: ``[examples, pieces]``.

    Returns:
        The norms with their bounds, never below the true ones, and the sizes as in
        `PerExampleGrads`, never below the norms.
    """
    square = jnp.stack([s.value for s in squares], axis=1)
    error = jnp.stack([s.error for s in squares], axis=1)
    floor = 1e8 * jnp.finfo(square.dtype).tiny
    root = upwards(jnp.sqrt(jnp.maximum(square + error, 0) + floor), 4)
    rough = [s.value if s.size is None else s.size for s in squares]
    size = jnp.maximum(jnp.sqrt(jnp.maximum(jnp.stack(rough, axis=1), 0)), root)
    sizes = jnp.where(scale == 0, 0, scale * size)
    return jnp.where(scale == 0, 0, scale * root), sizes


def _gram(values: list[Any], index: np.ndarray | None = None) -> Gram:
    """Inner products of all terms, of some of the entries where they are cut."""
    values = _joined(values)
    rows = [
        jnp.concatenate([_cross(x, y, index) for y in values], axis=3) for x in values
    ]
    found = jnp.concatenate(rows, axis=2) if len(rows) > 1 else rows[0]
    widths = [x.shape[3] for x in values if not isinstance(x, Rows)]
    if not widths:
        return Gram(found, 0, 0.0)
    width = max(widths) if index is None else index.size
    flushed = width * float(jnp.finfo(found.dtype).tiny)
    return Gram(found, inner_roundings(width, found.shape[2]), flushed)


def _cross(x: Any, y: Any, index: np.ndarray | None) -> Array:
    if isinstance(x, Rows) and isinstance(y, Rows):
        same = x.ids[..., :, None] == y.ids[..., None, :]
        if index is not None:
            same &= _member(x, index)[..., :, None]
        return same.astype(jnp.float32)
    if isinstance(x, Rows):
        return jnp.swapaxes(_cross(y, x, index), 2, 3)
    if isinstance(y, Rows):
        picked = jnp.take_along_axis(x, y.ids[:, :, None, :], axis=3)
        if index is not None:
            picked = jnp.where(_member(y, index)[..., None, :], picked, 0)
        return picked
    if index is not None:
        x, y = _take(x, index, 3), _take(y, index, 3)
    if x.shape[2] == 1 and y.shape[2] == 1:
        return total(x * y)[..., None]
    return inner_products(x, y)


def _member(rows: Rows, index: np.ndarray) -> Array:
    table = np.zeros(rows.size, bool)
    table[index] = True
    return jnp.asarray(table)[rows.ids]


def _take(x: Array, index: np.ndarray, axis: int) -> Array:
    """Entries of one axis, as a slice where they are neighbours."""
    if index.size == index[-1] - index[0] + 1:
        start = int(index[0])
        return jax.lax.slice_in_dim(x, start, start + index.size, axis=axis)
    return jnp.take(x, index, axis=axis)
