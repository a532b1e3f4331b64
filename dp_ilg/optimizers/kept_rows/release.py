"""The charged choice of rows: noise on the counts, then a public threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.clipping.lookups.counts import RowCounts
from dp_ilg.clipping.lookups.tables import Table, Tables, count_of
from dp_ilg.noise.add_noise import multiplier_at
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import Grid, check_multiplier, grid_of, noised
from dp_ilg.noise.secure import check_draws, given_rows

_ROW_TAG = 0x0F0175


def row_key(key: Any, plan: PrivacyPlan) -> Any:
    """The key of the counts' noise: another one for every plan.

    Example:
        >>> import dp_ilg
        >>> facts = dict(delta=1e-5, num_examples=100, batch_size=10, num_steps=3)
        >>> one, two = (dp_ilg.plan_privacy(noise_multiplier=z, **facts)
        ...     for z in (1.0, 2.0))
        >>> key = jax.random.key(0)
        >>> bool(row_key(key, one) == row_key(key, two))
        False
    """
    digest = int(plan.digest(), 16)
    key = jax.random.fold_in(key, _ROW_TAG)
    return jax.random.fold_in(key, np.uint32(digest & 0xFFFFFFFF))


class PastCounts(NamedTuple):
    """A running average of noisy counts, from zero; released.

    Attributes:
        average: float32 ``[rows]``, all tables one after another.
        variance: of the noise in each entry.
    """

    average: Any
    variance: Any

    @classmethod
    def none(cls, size: int) -> PastCounts:
        """Before the first step."""
        return cls(jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.float32))

    def with_counts(self, noisy: Any, stddev: Any, decay: float) -> PastCounts:
        """The average with one step more; a decay of 0 forgets all others."""
        average = decay * self.average + (1 - decay) * noisy
        variance = decay**2 * self.variance + (1 - decay) ** 2 * jnp.square(stddev)
        return PastCounts(average, variance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptRows:
    """The rows that take part in a step, as released.

    Attributes:
        ids: for each table int32 ``[most]``, ascending; numbers from `Table.rows` on
            stand for places that no row took.
        step: of which step.
        valid: False where no choice was released; the step is then NaN.
        past: the running average of the noisy counts, this step's among them.
        tables: which tables; static.
        plan: digest of the plan whose noise the counts have; static.

    Privacy: released, with noise; free to show.
    """

    ids: tuple[Any, ...]
    step: Any
    valid: Any
    past: PastCounts
    tables: Tables = dataclasses.field(metadata=dict(static=True))
    plan: str = dataclasses.field(default="", metadata=dict(static=True))

    def slots(self) -> list[Array]:
        """For each table a row's place among the kept, ``[rows]``; most for others."""
        return [
            jnp.full(table.rows, table.most, jnp.int32)
            .at[ids]
            .set(jnp.arange(table.most, dtype=jnp.int32), mode="drop")
            for table, ids in zip(self.tables, self.ids, strict=True)
        ]

    def counts(self) -> dict[str, Array]:
        """How many rows each table kept, by its path."""
        return {
            table.path: jnp.sum(ids < table.rows)
            for table, ids in zip(self.tables, self.ids, strict=True)
        }


def released_rows(
    counts: RowCounts,
    plan: PrivacyPlan,
    key: Any,
    step: Any,
    threshold: float,
    noise: Any = None,
    *,
    past: PastCounts | None = None,
    decay: float = 0.0,
) -> KeptRows:
    """Keeps the rows whose noisy count exceeds a threshold, the largest counts first.

    The count is that of the step, or an average over it and the steps before, which
    has less noise: who reads which row changes little from sample to sample.

    Args:
        counts: of the whole step, all chunks added.
        plan: the multiplier of the counts' noise.
        key: secret, for nothing else.
        step: which step, from 0.
        threshold: in standard deviations of the noise in that average.
        noise: draws from outside, or None.
        past: what the steps before released; None for the first step.
        decay: how much of the average a step keeps.

    Returns:
        The `KeptRows`. Past the plan, for draws of another step, and for counts that
        arithmetic was done on, the first rows, and `valid` is False.

    Raises:
        ValueError: for draws of another number of rows, or too much noise for the grid.
        TypeError: for draws of the wrong kind.

    Privacy: one Gaussian with multiplier ``plan.row_noise_multipliers[t]``: one example
    moves the counts by at most 1. All that follows is a function of the noisy counts of
    this step and of earlier ones.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=0.01, delta=1e-5, row_budget=.2,
        ...     num_examples=100, batch_size=10, num_steps=3)
        >>> tables = (Table("t", 0, 4, 3, 0),)
        >>> total = jnp.array([0.0, 5.0, 0.0, 2.0])
        >>> counts = RowCounts(total, jnp.zeros(4), tables)
        >>> released_rows(counts, plan, jax.random.key(0), 0, 4.0).ids[0].tolist()
        [1, 3, 6]
    """
    found, grid = noisy_counts(counts, plan, key, step, noise)
    past = PastCounts.none(found.size) if past is None else past
    past = past.with_counts(found, jnp.where(grid.bare, 0, grid.stddev), decay)
    least = threshold * jnp.sqrt(past.variance)
    found = past.average
    parts = [found[t.start : t.start + t.rows] for t in counts.tables]
    kept = [
        _largest(part, part > least, table, grid.valid)
        for part, table in zip(parts, counts.tables, strict=True)
    ]
    step = jnp.asarray(step)
    facts = counts.tables, plan.digest()
    return KeptRows(tuple(kept), step, grid.valid, past, *facts)


def noisy_counts(
    counts: RowCounts, plan: PrivacyPlan, key: Any, step: Any, noise: Any = None
) -> tuple[Float[Array, " rows"], Grid]:
    """The counts with this step's noise, and that noise.

    Args:
        counts: of the whole step.
        plan: as in `released_rows`.
        key: as in `released_rows`.
        step: as in `released_rows`.
        noise: as in `released_rows`.

    Returns:
        The release, float32; all NaN where `Grid.valid` is False.

    Privacy: as `released_rows`.
    """
    size = count_of(counts.tables)
    sigma = multiplier_at(plan.row_noise_multipliers, step)
    check_multiplier(float(plan.row_noise_multipliers.max()), size)
    check_draws(noise, plan.exact_noise)
    draw = array_steps(jax.random.fold_in(key, step), (size,))
    if noise is not None:
        draw, right = given_rows(noise, step, size)
        sigma = jnp.where(right, sigma, jnp.nan)
    sigma = jnp.where(counts.sound(), sigma, jnp.nan)
    grid = grid_of(1.0, sigma, size)
    return noised(counts.total, counts.remainder, grid, draw), grid


def _largest(
    noisy: Float[Array, " rows"], above: Bool[Array, " rows"], table: Table, valid: Any
) -> Int32[Array, " most"]:
    """The rows with the largest counts among those above the threshold, ascending."""
    beyond = jnp.arange(table.most, dtype=jnp.int32) + table.rows

    def few(_: Any) -> Array:
        places = jnp.cumsum(above, dtype=jnp.int32) - 1
        places = jnp.where(above, places, table.most)
        rows = jnp.arange(table.rows, dtype=jnp.int32)
        return beyond.at[places].set(rows, mode="drop")

    def many(_: Any) -> Array:
        best = lax.top_k(jnp.where(above, noisy, -jnp.inf), table.most)[1]
        return jnp.sort(best.astype(jnp.int32))

    ids = lax.cond(jnp.sum(above) > table.most, many, few, None)
    return jnp.where(valid, ids, jnp.arange(table.most, dtype=jnp.int32))


def gathered(leaf: Any, ids: Array) -> Array:
    """The rows of a table that were kept; zeros where no row took a place.

    Example:
        >>> gathered(jnp.arange(3.0)[:, None], jnp.array([1, 3])).tolist()
        [[1.0], [0.0]]
    """
    return jnp.asarray(leaf).at[ids].get(mode="fill", fill_value=0)


def scattered(leaf: Any, ids: Array, rows: Any) -> Array:
    """The table with other values in the rows that were kept.

    Example:
        >>> table = jnp.arange(3.0)[:, None]
        >>> scattered(table, jnp.array([1, 3]), jnp.full((2, 1), 9.0)).tolist()
        [[0.0], [9.0], [2.0]]
    """
    how: Any = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
    return jnp.asarray(leaf).at[ids].set(rows, **how)


def narrow(leaves: Sequence[Any], owners: Sequence[int | None], ids: Any) -> list[Any]:
    """Leaves in which each table has its kept rows alone.

    Args:
        leaves: any arrays.
        owners: for each the number of the table whose rows it has, or None.
        ids: the kept rows of every table.

    Example:
        >>> rows = [jnp.array([2])]
        >>> [x.tolist() for x in narrow([jnp.eye(3), jnp.ones(1)], [0, None], rows)]
        [[[0.0, 0.0, 1.0]], [1.0]]
    """
    return [
        leaf if k is None else gathered(leaf, ids[k])
        for leaf, k in zip(leaves, owners, strict=True)
    ]


def widen(
    leaves: Sequence[Any], small: Sequence[Any], owners: Sequence[int | None], ids: Any
) -> list[Any]:
    """Puts kept rows back, and takes all leaves that are no table as they became.

    Example:
        >>> rows = [jnp.array([2])]
        >>> (table,) = widen([jnp.zeros((3, 1))], [jnp.ones((1, 1))], [0], rows)
        >>> table.ravel().tolist()
        [0.0, 0.0, 1.0]
    """
    return [
        new if k is None else scattered(leaf, ids[k], new)
        for leaf, new, k in zip(leaves, small, owners, strict=True)
    ]
