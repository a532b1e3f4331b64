"""Norms of gradients that are few rows of a long table, by sorting the row numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.few import SPARE_SIZE, lengths_of
from dp_ilg.clipping.bookkeeping.parts import (
    ERROR_MARGIN,
    Part,
    Square,
    square_with_loss,
)
from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.geometry.rounding import additions, gamma, total, unit

FEWEST = 8
"""From how many terms on sorting beats comparing every term with every other."""


def squares_of_rows(part: Part, rows: Rows, values: Array, side: str) -> list[Square]:
    """Squared norm of every piece of one lookup, and what bounds its rounding.

    Terms of one row are added up first. A row of m terms is wrong by ``gamma_(m-1)`` of
    the sum of their norms, which is kept beside; a row of one term is exact.

    Args:
        part: the part.
        rows: the row numbers, ``[examples, batch, terms]``.
        values: what each term adds to its row, ``[..., terms, entries]``.
        side: the factor that carries the pieces: "rows", "entries", "batch" or "".

    Returns:
        One `Square` a piece.
    """
    groups, labels = part.side.groups, part.side.labels
    width = values.shape[3]
    if side == "entries":
        cuts = [jnp.asarray(labels == g, values.dtype) for g in groups]
        return [_piece(*_by_row(rows, values * cut)[1:], width) for cut in cuts]
    ids, squares, lost, reach = _by_row(rows, values)
    if side == "":
        masks = [jnp.ones((), values.dtype)]
    elif side == "batch":
        masks = [jnp.asarray(labels == g, values.dtype)[:, None] for g in groups]
    else:
        own = jnp.asarray(labels)[ids]
        masks = [(own == g).astype(squares.dtype) for g in groups]
    return [_piece(squares * m, lost * m, reach * m, width) for m in masks]


def _piece(squares: Array, lost: Array, reach: Array, width: int) -> Square:
    """A piece from squares, losses and sizes of rows, ``[examples, batch, terms]``."""
    flat = squares.reshape(squares.shape[0], -1)
    roundings = additions(width) + 1 + additions(flat.shape[1])
    underflow = flat.shape[1] * width * float(jnp.finfo(squares.dtype).tiny)
    away = jnp.sqrt(jnp.sum(jnp.square(lost), axis=(1, 2)))
    square = square_with_loss(total(flat), roundings, underflow, away)
    return Square(*square, SPARE_SIZE * jnp.sum(reach, axis=(1, 2)))


def _by_row(rows: Rows, values: Array) -> tuple[Array, Array, Array, Array]:
    """Row numbers in order; a row's square, loss and squared size at its first term."""
    places = jnp.broadcast_to(jnp.arange(rows.ids.shape[2]), rows.ids.shape)
    ids, order = lax.sort((rows.ids, places), dimension=2, num_keys=1)
    change = ids[..., 1:] != ids[..., :-1]
    first = jnp.pad(change, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    segment = jnp.cumsum(first.astype(jnp.int32), axis=2) - 1
    sizes = lengths_of(values)[..., None]
    both = jnp.concatenate([values, sizes, jnp.ones_like(sizes)], axis=3)
    taken = jnp.take_along_axis(both, order[..., None], axis=2)
    one, two, _ = np.ix_(*map(np.arange, rows.ids.shape))
    summed = jnp.zeros_like(both).at[one, two, segment].add(taken)
    square = total(jnp.square(summed[..., :-2]))
    sure = 1 + gamma(2 * rows.ids.shape[2], values.dtype)
    share = unit(values.dtype) * sure * ERROR_MARGIN
    loss = share * jnp.maximum(summed[..., -1] - 1, 0) * summed[..., -2]
    facts = square, loss, jnp.square(summed[..., -2])
    pick = [jnp.take_along_axis(x, segment, axis=2) for x in facts]
    square, loss, reach = (jnp.where(first, x, 0) for x in pick)
    return ids, square, loss, reach
