"""Random words to a draw: integers only, so that the law is exact on any machine.

One draw takes 192 bits: 12 choose a column of the table, 84 decide between its two
cells, 95 smooth. It is a whole number of steps of 2^-27 standard deviations.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dp_ilg.noise import table

Words = tuple[Any, ...]
WORDS = 6  # of 32 bits, for one draw


def steps_of(words: Words, xp: Any = jnp) -> Any:
    """Six random words to one draw: 12 bits choose a column, 84 its cell, 95 smooth.

    Args:
        words: six uint32 arrays of one shape, independent and uniform.
        xp: ``jax.numpy``, or ``numpy`` on the host: the same integers.

    Returns:
        int32 of that shape, in steps of 2^-27 standard deviations.

    Privacy: as `normal_steps`; nothing but integer operations and one table.

    Example:
        >>> words = tuple(np.zeros(1, np.uint32) for _ in range(6))
        >>> steps_of(words, np).dtype
        dtype('int32')
    """
    column, middle, low, *rest = words
    index = (column >> np.uint32(20)).astype(np.int32)
    first, second, third = (_at(x, index, xp) for x in table.alias_table())
    high, threshold = column & np.uint32(0xFFFFF), first & np.uint32(0xFFFFF)
    close = (middle < second) | ((middle == second) & (low < third))
    own = (high < threshold) | ((high == threshold) & close)
    cell = xp.where(own, column, first) >> np.uint32(20)
    offset = (table.COLUMNS // 2 << table.CELL_BITS) + table.centre()
    found = (cell << np.uint32(table.CELL_BITS)) + _smoothing(*rest)
    return (found - np.uint32(offset % 2**32)).astype(np.uint32).view(np.int32)


def _at(column: np.ndarray, index: Any, xp: Any) -> Any:
    if xp is np:
        return column[index]
    return jnp.asarray(column).at[index].get(mode="promise_in_bounds")


def _smoothing(a: Any, b: Any, c: Any) -> Any:
    """V1 + ... + V8 from 95 bits of three words: see `table.SMOOTHING_BITS`."""
    u = np.uint32
    found = (a >> u(12)) + (b >> u(12)) + (c >> u(12))
    found = found + ((((a & u(0xFFF)) << u(2)) | (b & u(3))) << u(6))
    found = found + (((b >> u(2)) & u(0x1FF)) << u(11))
    found = found + ((c & u(0x3F)) << u(14)) + (((c >> u(6)) & u(0xF)) << u(16))
    return found + (((c >> u(10)) & u(3)) << u(18))


def in_stddevs(steps: Int32[Array, "..."]) -> Float[Array, "..."]:
    """Draws in standard deviations, rounded to float32: ``(X + 1/2) 2^-27``.

    Example:
        >>> in_stddevs(jnp.int32(1 << 27)).item()
        1.0
    """
    return (steps.astype(jnp.float32) + 0.5) * np.float32(2.0**-table.GRID_BITS)
