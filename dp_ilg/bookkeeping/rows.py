"""Norms of gradients that are few rows of a long table, by sorting the row numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.bookkeeping.parts import Part
from dp_ilg.bookkeeping.rules import Rows

FEWEST = 8
"""From how many terms on sorting beats comparing every term with every other."""


def squares_of_rows(part: Part, rows: Rows, values: Array, side: str) -> list[Array]:
    """Squared norm of every piece of one lookup, ``[examples]``.

    Terms of one row are added up first, so nothing cancels later.

    Args:
        part: the part.
        rows: the row numbers, ``[examples, batch, terms]``.
        values: what each term adds to its row, ``[..., terms, entries]``.
        side: the factor that carries the pieces: "rows", "entries", "batch" or "".

    Returns:
        One array a piece.
    """
    ids, summed, segment = _summed(rows, values)
    own = np.concatenate([part.side.labels, np.zeros(0, int)])
    groups = part.side.groups
    if side == "entries":
        cuts = [jnp.asarray(own == g, summed.dtype) for g in groups]
        return [jnp.sum(jnp.square(summed) * cut, axis=(1, 2, 3)) for cut in cuts]
    squares = jnp.sum(jnp.square(summed), axis=3)
    if side == "":
        return [jnp.sum(squares, axis=(1, 2))]
    if side == "batch":
        cuts = [jnp.asarray(own == g, squares.dtype)[None, :, None] for g in groups]
        return [jnp.sum(squares * cut, axis=(1, 2)) for cut in cuts]
    first = jnp.concatenate(
        [jnp.ones_like(segment[..., :1], bool), segment[..., 1:] != segment[..., :-1]],
        axis=2,
    )
    each = jnp.where(first, jnp.take_along_axis(squares, segment, axis=2), 0)
    labels = jnp.asarray(own)[ids]
    return [jnp.sum(jnp.where(labels == g, each, 0), axis=(1, 2)) for g in groups]


def _summed(rows: Rows, values: Array) -> tuple[Array, Array, Array]:
    """Sorted row numbers, the sum of every distinct row, and which row each term is."""
    places = jnp.broadcast_to(jnp.arange(rows.ids.shape[2]), rows.ids.shape)
    ids, order = lax.sort((rows.ids, places), dimension=2, num_keys=1)
    change = (ids[..., 1:] != ids[..., :-1]).astype(jnp.int32)
    segment = jnp.pad(jnp.cumsum(change, axis=2), ((0, 0), (0, 0), (1, 0)))
    taken = jnp.take_along_axis(values, order[..., None], axis=2)
    one, two, _ = np.ix_(*map(np.arange, rows.ids.shape))
    zeros = jnp.zeros_like(values)
    return ids, zeros.at[one, two, segment].add(taken), segment
