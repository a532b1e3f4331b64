"""Scores of all examples, bounded to norm 1 and added without rounding.

Whatever a score returns, what is added is a vector of norm at most 1: one that is
longer is divided by its norm, one that is not finite is 0, and all are shortened by
what float32 may have rounded. Each entry is then rounded towards zero to a public step,
so that sums are exact.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dp_ilg.base import PerExampleGrads
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.clipping.scores.statistics import vectors
from dp_ilg.clipping.scores.table import SCORES, Score
from dp_ilg.geometry import grid
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import weighted_norm
from dp_ilg.geometry.rounding import weighted_norm_rounding

ROUNDING_SLACK = 2e-6
"""Relative margin left under the bound, for float32 rounding."""


def sum_scores(
    score: Score,
    per_example: PerExampleGrads,
    norms: Float[Array, "batch groups"],
    present: Bool[Array, " batch"],
    geometry: Geometry,
) -> dict[str, Array]:
    """Sum over examples of their scores.

    Args:
        score: the score.
        per_example: what the engine found.
        norms: of every example and group; 0 for absent ones.
        present: False for padding and for examples without a finite gradient.
        geometry: of the clip.

    Returns:
        `layer_shares` and `shares_remainder` of a `dp_ilg.ClippedGrad`.

    Privacy: sensitivity 1 in L2 for adding or removing one example, whatever the score
    returns.

    Example:
        >>> from dp_ilg.clipping.per_example import from_gradients
        >>> geometry = Geometry.uniform({"a": jnp.ones(2), "b": jnp.ones(1)})
        >>> gradients = {"a": jnp.array([[3.0, 0.0]]), "b": jnp.array([[4.0]])}
        >>> found = from_gradients(gradients, geometry.groups)
        >>> loud = Score(lambda one: 5 * one.norms)
        >>> sums = sum_scores(loud, found, found.norms, jnp.ones(1, bool), geometry)
        >>> [round(float(x), 4) for x in sums["layer_shares"]]
        [0.6, 0.8]
    """
    if score == SCORES["l2"]:
        units = _l2(norms, present)
    else:
        units = _bounded(vectors(score, per_example, norms, geometry), present)
    slack = ROUNDING_SLACK + weighted_norm_rounding(norms.shape[-1], norms.dtype)
    units = units * np.float32(1 - slack)
    with wide():
        step = np.float64(grid.SHARE_STEP)
        total = jnp.sum(jnp.trunc(widened(units) / step) * step, axis=0)
        high, low = grid.split_shares(total)
    return {"layer_shares": high, "shares_remainder": low}


def _l2(norms: Array, present: Array) -> Array:
    """The default: all examples at once, and of norm 1 by themselves."""
    overall = weighted_norm(norms, jnp.ones(norms.shape[-1], norms.dtype))
    usable = present & (overall > 0) & jnp.isfinite(overall)
    units = norms / jnp.where(usable, overall, 1)[:, None]
    return jnp.where(usable[:, None], units, 0)


def _bounded(scores: Array, present: Array) -> Array:
    """Vectors of norm at most 1, to rounding; 0 where absent or not finite."""
    finite = present & jnp.all(jnp.isfinite(scores), axis=-1)
    scores = jnp.where(finite[:, None], scores, 0)
    length = weighted_norm(scores, jnp.ones(scores.shape[-1], scores.dtype))
    usable = finite & jnp.isfinite(length)
    units = scores / jnp.maximum(length, 1)[:, None]
    return jnp.where(usable[:, None], units, 0)
