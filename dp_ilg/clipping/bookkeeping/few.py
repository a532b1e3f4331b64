"""Norms of gradients that are sums of few products, to the rounding of a sum.

Gram products square what cancels: where the terms of an example leave a tenth of their
size, a hundred times the rounding is left, too. Few terms are made orthogonal instead
(modified Gram-Schmidt in one factor, its triangle in the other), which costs as much:
``sum_t x_t y_t^T = sum_t q_t e_t^T`` with orthogonal ``q_t`` has the squared norm
``sum_t |q_t|^2 |e_t|^2``. Whatever cancels does so in ``e_t``, before it is squared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.parts import Side, Square
from dp_ilg.clipping.bookkeeping.rules import Rows

MOST = 8
"""Up to how many terms."""
GUARD = 0.25
"""Of the reach of a square, times the rounding unit, is what `norms` adds to it."""
SPARE_SIZE = 1 + 1e-3
"""What a size, squared, is made larger by, so that its own rounding is covered."""
_EXACT = lax.Precision.HIGHEST
_SPARE = 2.0  # rounding units of the terms' sizes by which a norm may be wrong


class _Orthogonal(NamedTuple):
    """Orthogonal terms of one factor, as what they were made of.

    Attributes:
        squares: of their norms, ``[examples, batch, terms]``.
        mix: upper triangle: which terms of the other factor each one takes,
            ``[examples, batch, terms, terms]``.
        sizes: norms of the terms as they were.
    """

    squares: Array
    mix: Array
    sizes: Array


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
    """One piece's square and reach; the reach makes the norm larger by `_SPARE`."""
    if choose is not None:
        mixed, rest = jnp.where(choose, mixed, 0), jnp.where(choose, rest, 0)
    energy = jnp.sum(jnp.square(mixed), axis=3)
    square = jnp.sum(found.squares * energy, axis=(1, 2))
    lengths = jnp.sqrt(jnp.sum(jnp.square(rest), axis=3))
    reach = jnp.square(jnp.sum(found.sizes * lengths, axis=2)).sum(axis=1)
    unit = jnp.finfo(square.dtype).eps
    both = 2 * _SPARE * jnp.sqrt(square * reach) + _SPARE**2 * unit * reach
    return Square(square, both / GUARD, SPARE_SIZE * reach)


def _of_vectors(x: Array) -> _Orthogonal:
    """Modified Gram-Schmidt over the terms; a term of size 0 takes nothing."""
    terms = x.shape[2]
    left = [x[:, :, t] for t in range(terms)]
    squares, rows = [], []
    for t in range(terms):
        square = jnp.sum(jnp.square(left[t]), axis=2)
        safe = jnp.where(square > 0, square, 1)
        row = [jnp.zeros_like(square)] * t + [jnp.ones_like(square)]
        for s in range(t + 1, terms):
            share = jnp.sum(left[t] * left[s], axis=2) / safe
            left[s] = left[s] - share[..., None] * left[t]
            row.append(share)
        squares.append(square)
        rows.append(jnp.stack(row, axis=2))
    sizes = jnp.sqrt(jnp.sum(jnp.square(x), axis=3))
    return _Orthogonal(jnp.stack(squares, axis=2), jnp.stack(rows, axis=2), sizes)


def _of_rows(x: Rows) -> _Orthogonal:
    """Different rows are orthogonal: the first term of a row takes all of them."""
    same = x.ids[..., :, None] == x.ids[..., None, :]
    earlier = jnp.tril(same, -1).any(axis=3)
    mix = jnp.where(earlier[..., None], False, same).astype(jnp.float32)
    return _Orthogonal(1 - earlier.astype(jnp.float32), mix, jnp.ones(x.ids.shape))
