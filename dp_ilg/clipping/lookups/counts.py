"""Row counts: bounded by one example, and added without rounding.

An example that looks up k different rows adds ``1 / sqrt(k)`` to each of them: a vector
of norm at most 1, whichever rows they are and however many.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from dp_ilg.base import SEAL
from dp_ilg.clipping.adding.sum_error import check_lot
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.clipping.lookups.tables import Tables, count_of
from dp_ilg.geometry.grid import SHARE_STEP, split_shares, two_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How often rows are read by the examples of a step, each example of length 1.

    Attributes:
        total: float32 ``[rows]``, all tables one after another.
        remainder: what `total` was rounded by, float32 ``[rows]``.
        tables: which tables; static.
        seal: constants, by which arithmetic on the whole is found out.

    Privacy: adding or removing one example moves ``total + remainder`` by at most 1 in
    L2. Not private before noise.

    Example:
        >>> from dp_ilg.clipping.lookups.tables import Table
        >>> one = RowCounts(jnp.ones(2), jnp.zeros(2), (Table("t", 0, 2, 1, 0),))
        >>> (one + one).total.tolist()
        [2.0, 2.0]
    """

    total: Any
    remainder: Any
    tables: Tables = dataclasses.field(metadata=dict(static=True))
    seal: Any = SEAL

    def __add__(self, other: Any) -> RowCounts:
        """Joins two chunks of the same step, exactly."""
        if not isinstance(other, RowCounts):
            return NotImplemented
        if self.tables != other.tables:
            raise ValueError(
                f"Two chunks count rows of {self.tables} and {other.tables}; count all "
                "chunks of a step for the same parameters and tables."
            )
        high, rest = two_sum(self.total, other.total)
        high, low = two_sum(high, self.remainder + other.remainder + rest)
        kinds, *marks = zip(self.seal, other.seal, strict=True)
        others = [jnp.where(one == two, one, 0) for one, two in marks]
        seal = (jnp.minimum(*kinds), *others)
        return RowCounts(high, low, self.tables, seal)

    def sound(self) -> Array:
        """Whether it is as counting left it: no arithmetic was done on the whole."""
        parts = [jnp.asarray(x) for x in jax.tree.leaves(self.seal)]
        kinds = [[(x.dtype, x.shape) for x in seal] for seal in (parts, SEAL)]
        if kinds[0] != kinds[1]:
            return jnp.asarray(False)
        marks = [jnp.all(x == y) for x, y in zip(parts, SEAL, strict=True)]
        return jnp.stack(marks).all()


def steps_each(most: int) -> np.ndarray:
    """For k = 0..most the most steps of 2^-24 whose k squares add up to at most 1.

    Example:
        >>> steps_each(4).astype(int).tolist()
        [0, 16777216, 11863283, 9686330, 8388608]
    """
    whole = round(1 / SHARE_STEP)
    found = [0] + [math.isqrt(whole * whole // k) for k in range(1, most + 1)]
    return np.array(found, np.float64)


def count_rows(
    numbers: Int32[Array, "batch lookups"], present: Bool[Array, " batch"], tables: Any
) -> RowCounts:
    """Adds up which rows the examples read.

    Args:
        numbers: from `dp_ilg.clipping.lookups.traced.looked_up`, or a user's; what is
            no row of the tables counts nowhere.
        present: False for padding.
        tables: which tables.

    Returns:
        The sum, on a public grid: each example's entries are whole steps of 2^-24.

    Raises:
        ValueError: for more examples than the grid holds.

    Privacy: sensitivity 1 for adding or removing one example, whatever `numbers` are: a
    row counts once an example, and k rows count ``1 / sqrt(k)`` each, rounded down.

    Example:
        >>> from dp_ilg.clipping.lookups.tables import Table
        >>> numbers = jnp.array([[0, 2, 2], [2, 2, 2], [1, 1, 1]])
        >>> present = jnp.array([True, True, False])
        >>> found = count_rows(numbers, present, (Table("t", 0, 3, 2, 0),))
        >>> [round(float(x), 3) for x in found.total]
        [0.707, 0.0, 1.707]
    """
    size = count_of(tables)
    check_lot(numbers.shape[0], size)
    ids = jnp.where((numbers >= 0) & (numbers < size), numbers, size)
    ids = lax.sort(ids.astype(jnp.int32), dimension=1)
    change = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = change & (ids < size) & present[:, None]
    distinct = jnp.sum(first, axis=1)
    with wide():
        table = jnp.asarray(steps_each(ids.shape[1]))
        each = jnp.where(first, table[distinct][:, None], np.float64(0))
        zeros = widened(jnp.zeros(size, jnp.float32))
        steps = zeros.at[ids].add(each, mode="drop")
        high, low = split_shares(steps * np.float64(SHARE_STEP))
    return RowCounts(high, low, tables)
