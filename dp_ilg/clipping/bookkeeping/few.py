"""Norms of gradients that are sums of few products, to the rounding of a sum.

Gram products square what cancels: where the terms of an example leave a tenth of their
size, a hundred times the rounding is left, too. Few terms are made orthogonal instead
(modified Gram-Schmidt in one factor, its triangle in the other), which costs as much:
``sum_t x_t y_t^T = sum_t q_t e_t^T`` with orthogonal ``q_t`` has the squared norm
``sum_t |q_t|^2 |e_t|^2``. Whatever cancels does so in ``e_t``, before it is squared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.parts import (
    ERROR_MARGIN,
    Side,
    Square,
    square_with_loss,
)
from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.geometry.rounding import additions, gamma, total, upwards

MOST = 8
"""Up to how many terms."""
SPARE_SIZE = 1 + 1e-3
"""What a size, squared, is made larger by, so that its own rounding is covered."""
_EXACT = lax.Precision.HIGHEST
_SURE = 2.0**30  # squares below so many flushed entries take no part: see _of_vectors


class _Orthogonal(NamedTuple):
    """Orthogonal terms of one factor, as what they were made of.

    Attributes:
        squares: of their norms, ``[examples, batch, terms]``.
        mix: upper triangle: which terms of the other factor each one takes,
            ``[examples, batch, terms, terms]``.
        sizes: norms of the terms as they were, never below them.
        lost: how far a term is from what `squares` and `mix` say at most.
        roundings: relative ones in `squares`.
        width: entries of a term.
    """

    squares: Array
    mix: Array
    sizes: Array
    lost: Array
    roundings: int
    width: int


def squares_of_few(side: Side, first: Any, second: Any) -> list[Square] | None:
    """Squared norm of every piece of a part, and what bounds its rounding.

    Args:
        side: how the part is cut into pieces.
        first: its scaled first factor, ``[examples, batch, terms, first]`` or `Rows`.
        second: the second one.

    Returns:
        One `Square` a piece, as `factors.squares_of_factors`; None where
        there are more terms than `MOST`, or both factors are rows.
    """
    cut = side.name
    swap = cut == "first" if cut in ("first", "second") else isinstance(second, Rows)
    base, rest = (second, first) if swap else (first, second)
    if isinstance(rest, Rows):
        if cut not in ("first", "second") or isinstance(base, Rows):
            return None
        base, rest, cut = rest, base, "rows"
    if rest.shape[2] > MOST:
        return None
    found = _of_rows(base) if isinstance(base, Rows) else _of_vectors(base)
    mixed = jnp.einsum("bgts,bgsc->bgtc", found.mix, rest, precision=_EXACT)
    return [
        _piece(found, mixed, rest, choose)
        for choose in _choices(side, cut, base, rest.ndim)
    ]


def _choices(side: Side, cut: str, base: Any, ndim: int) -> list[Any]:
    """Masks of the pieces over the other factor, or None for all of it."""
    groups, labels = side.groups, side.labels
    if cut == "":
        return [None]
    if cut == "rows":
        own = jnp.asarray(labels)[base.ids]
        return [(own == g)[..., None] for g in groups]
    axis = 1 if cut == "batch" else 3
    shape = [1] * ndim
    shape[axis] = -1
    return [jnp.asarray(np.reshape(labels == g, shape)) for g in groups]


def _piece(found: _Orthogonal, mixed: Array, rest: Array, choose: Any) -> Square:
    """One piece's square, error and size; docs/rounding.md, "Few terms"."""
    if choose is not None:
        mixed, rest = jnp.where(choose, mixed, 0), jnp.where(choose, rest, 0)
    terms, width, dtype = rest.shape[2], rest.shape[3], rest.dtype
    energy = total(jnp.square(mixed))
    own = (found.squares * energy).reshape(energy.shape[0], -1)
    roundings = found.roundings + additions(width) + 2 + additions(own.shape[1])
    lengths = lengths_of(rest)
    mixing = jnp.einsum("bgts,bgs->bgt", jnp.abs(found.mix), lengths, precision=_EXACT)
    roots = _roots(found.squares, found.width)
    wrong = jnp.sum(found.lost * lengths, axis=2)
    wrong += gamma(terms, dtype) * jnp.sum(roots * mixing, axis=2)
    away = jnp.sqrt(jnp.sum(jnp.square(wrong), axis=1))
    underflow = _flushed(found.width, dtype) * energy
    underflow += _flushed(width, dtype) * (found.squares + 1)
    square = square_with_loss(
        total(own), roundings, jnp.sum(underflow, axis=(1, 2)), ERROR_MARGIN * away
    )
    size = jnp.square(jnp.sum(found.sizes * lengths, axis=2)).sum(axis=1)
    return Square(*square, SPARE_SIZE * size)


def lengths_of(x: Array) -> Array:
    """Norms over the last axis, never below them."""
    return _roots(total(jnp.square(x)), x.shape[-1])


def _roots(squares: Array, width: int) -> Array:
    """Upper bounds of norms over so many entries, from their squares as computed."""
    root = jnp.sqrt(squares + _flushed(width, squares.dtype))
    return upwards(root, (additions(width) + 2) / 2 + 1)


def _flushed(width: int, dtype: Any) -> float:
    """What a sum of so many products loses at most where denormals are zero."""
    return width * float(jnp.finfo(dtype).tiny)


def _of_vectors(x: Array) -> _Orthogonal:
    """Modified Gram-Schmidt over the terms; a term of size 0 takes nothing."""
    terms, width = x.shape[2:]
    left, squares, rows = x, [], []
    for t in range(terms):
        own = left[:, :, :1]
        products = total(own * left)
        square = products[:, :, :1]
        sure = square > _SURE * _flushed(width, x.dtype)
        share = jnp.where(sure, products[:, :, 1:] / jnp.where(sure, square, 1), 0)
        left = left[:, :, 1:] - share[..., None] * own
        before = jnp.zeros((*square.shape[:2], t), x.dtype)
        rows.append(jnp.concatenate([before, jnp.ones_like(square), share], axis=2))
        squares.append(square)
    mix, square = jnp.stack(rows, axis=2), jnp.concatenate(squares, axis=2)
    sizes = lengths_of(x)
    lost = _lost(square, mix, sizes, width)
    return _Orthogonal(square, mix, sizes, lost, additions(width) + 1, width)


def _lost(squares: Array, mix: Array, sizes: Array, width: int) -> Array:
    """How far each term is from its orthogonal parts at most: a sum over the steps.

    A step is an orthogonal reflection but for the error of its inner product, which
    counts by the root of two, and of one subtraction.
    """
    dtype, terms = squares.dtype, squares.shape[2]
    flush = float(np.sqrt(_flushed(width, dtype)))
    step = gamma(gram_schmidt_roundings(width), dtype)
    sure = squares > _SURE * _flushed(width, dtype)
    roots = _roots(squares, width)
    above = jnp.asarray(np.triu(np.ones((terms, terms)), 1), dtype)
    taken = jnp.sum(jnp.abs(mix) * above * roots[..., None], axis=2)
    steps = np.arange(terms, dtype=dtype)
    largest = (1 + 2.0**-10) * (sizes + 4 * terms * flush)
    lost = step * (steps * largest + taken) + 4 * steps * flush
    return ERROR_MARGIN * (lost + jnp.where(sure, 0, roots))


def gram_schmidt_roundings(width: int) -> int:
    """Roundings of the size of a term in one step of Gram-Schmidt over such terms."""
    return math.ceil(math.sqrt(2) * (additions(width) + 4)) + 3


def _of_rows(x: Rows) -> _Orthogonal:
    """Different rows are orthogonal: the first term of a row takes all of them."""
    same = x.ids[..., :, None] == x.ids[..., None, :]
    earlier = jnp.tril(same, -1).any(axis=3)
    mix = jnp.where(earlier[..., None], False, same).astype(jnp.float32)
    ones = jnp.ones(x.ids.shape)
    squares = 1 - earlier.astype(jnp.float32)
    return _Orthogonal(squares, mix, ones, jnp.zeros_like(ones), 0, 0)
