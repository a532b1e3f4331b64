"""Norms of gradients that are few rows of a long table, by sorting the row numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.few import SPARE_SIZE
from dp_ilg.clipping.bookkeeping.parts import Part, Square
from dp_ilg.clipping.bookkeeping.rules import Rows

FEWEST = 8
"""From how many terms on sorting beats comparing every term with every other."""


def squares_of_rows(part: Part, rows: Rows, values: Array, side: str) -> list[Square]:
    """Squared norm of every piece of one lookup, and what bounds its rounding.

    Terms of one row are added up first. Where they cancel, the sum over examples may
    round otherwise than this does, so the sum of their norms is kept beside.

    Args:
        part: the part.
        rows: the row numbers, ``[examples, batch, terms]``.
        values: what each term adds to its row, ``[..., terms, entries]``.
        side: the factor that carries the pieces: "rows", "entries", "batch" or "".

    Returns:
        One `Square` a piece.
    """
    groups, labels = part.side.groups, part.side.labels
    if side == "entries":
        cuts = [jnp.asarray(labels == g, values.dtype) for g in groups]
        found = [_by_row(rows, values * cut) for cut in cuts]
        whole = [
            (jnp.sum(q, axis=(1, 2)), jnp.sum(r, axis=(1, 2))) for _, q, r in found
        ]
        return [Square(q, r, SPARE_SIZE * r) for q, r in whole]
    ids, squares, reach = _by_row(rows, values)
    if side == "":
        masks = [jnp.ones((), squares.dtype)]
    elif side == "batch":
        masks = [jnp.asarray(labels == g, squares.dtype)[:, None] for g in groups]
    else:
        own = jnp.asarray(labels)[ids]
        masks = [(own == g).astype(squares.dtype) for g in groups]
    pairs = [[jnp.sum(x * m, axis=(1, 2)) for x in (squares, reach)] for m in masks]
    return [Square(q, r, SPARE_SIZE * r) for q, r in pairs]


def _by_row(rows: Rows, values: Array) -> tuple[Array, Array, Array]:
    """Row numbers in order; the square and the reach of a row at its first term."""
    places = jnp.broadcast_to(jnp.arange(rows.ids.shape[2]), rows.ids.shape)
    ids, order = lax.sort((rows.ids, places), dimension=2, num_keys=1)
    change = ids[..., 1:] != ids[..., :-1]
    first = jnp.pad(change, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    segment = jnp.cumsum(first.astype(jnp.int32), axis=2) - 1
    sizes = jnp.sqrt(jnp.sum(jnp.square(values), axis=3, keepdims=True))
    both = jnp.concatenate([values, sizes], axis=3)
    taken = jnp.take_along_axis(both, order[..., None], axis=2)
    one, two, _ = np.ix_(*map(np.arange, rows.ids.shape))
    summed = jnp.zeros_like(both).at[one, two, segment].add(taken)
    square = jnp.sum(jnp.square(summed[..., :-1]), axis=3)
    reach = jnp.square(summed[..., -1])
    pick = [jnp.take_along_axis(x, segment, axis=2) for x in (square, reach)]
    return ids, jnp.where(first, pick[0], 0), jnp.where(first, pick[1], 0)
