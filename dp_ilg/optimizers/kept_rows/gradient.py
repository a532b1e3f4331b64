"""The clipped sum of a step on kept rows, and what is checked around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad
from dp_ilg.clipping.lookups.tables import Tables, count_of
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.optimizers.kept_rows.release import KeptRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradient:
    """The clipped sum of a step on kept rows, and which rows these are.

    Attributes:
        clipped: the `ClippedGrad`, each table with `Table.most` rows.
        kept: the rows.

    Privacy: as `ClippedGrad`: sensitivity C given the kept rows, not private before
    noise.
    """

    clipped: ClippedGrad
    kept: KeptRows

    def __add__(self, other: Any) -> RowGradient:
        """Joins two chunks of the same step; NaN is released if their rows differ."""
        if not isinstance(other, RowGradient):
            return NotImplemented
        pairs = zip(
            jax.tree.leaves(self.kept), jax.tree.leaves(other.kept), strict=True
        )
        alike = jnp.stack([jnp.all(one == two) for one, two in pairs]).all()
        return RowGradient(where_sound(self.clipped + other.clipped, alike), self.kept)


def where_sound(clipped: ClippedGrad, sound: Any) -> ClippedGrad:
    """The sum, of which NaN is released unless `sound`."""
    bound = jnp.where(sound, clipped.l2_clip_norm, jnp.nan)
    return dataclasses.replace(clipped, l2_clip_norm=bound)


def said_rows(ids: Any, tables: Tables) -> jax.Array:
    """What a user's function says of one example, as numbers of all tables' rows."""
    names = [table.path for table in tables]
    if not isinstance(ids, Mapping) or set(ids) - set(names):
        raise ValueError(
            f"rows_of returned {validation.shown(ids)}, but must return a mapping from "
            f"{', '.join(names)} to row numbers."
        )
    found = []
    for table in tables:
        own = jnp.asarray(ids.get(table.path, jnp.zeros(0, jnp.int32))).reshape(-1)
        inside = (own >= 0) & (own < table.rows)
        own = jnp.where(inside, own, 0).astype(jnp.int32)
        found.append(jnp.where(inside, own + table.start, count_of(tables)))
    return jnp.concatenate(found)


def check_geometry(geometry: Geometry, tables: Tables) -> None:
    """Raises for a table that is frozen."""
    for table in tables:
        if not geometry.groups.leaves[table.leaf].groups:
            raise ValueError(
                f"{table.path} is frozen, so that no row of it takes part; leave it "
                "out of tables."
            )


def check_kept(kept: Any, plan: PrivacyPlan) -> None:
    """Raises for rows that were chosen by counts of another plan's noise."""
    if not isinstance(kept, KeptRows):
        raise TypeError(
            f"kept is {type(kept).__name__}, but must be what kept returned for the "
            "step."
        )
    if kept.plan != plan.digest():
        raise ValueError(
            f"The rows were kept under plan {kept.plan[:8]}, but this optimizer has "
            f"plan {plan.digest()[:8]}, which accounts for other noise; choose rows "
            "and take the step with one optimizer."
        )


def check_size(plan: PrivacyPlan, clipped: ClippedGrad, tables: Tables) -> None:
    """Raises for more numbers a step than delta has paid for, counts included."""
    groups = clipped.geometry.groups
    count = sum(groups.sizes) + len(groups.names) + count_of(tables)
    count += 0 if clipped.metrics is None else clipped.metrics.total.size
    if count > plan.most_parameters and plan.noise_multipliers.any():
        raise ValueError(
            f"A step draws {count:,} numbers (kept rows, other parameters, scores, "
            f"metrics and counts), but the plan pays for {plan.most_parameters:,}; "
            f"plan with num_parameters={count} or exact_noise=True."
        )
