"""Slack: what the bound leaves of an example, as one more coordinate of it.

An example whose clipped gradient is shorter than C has room to spare. With
``s_i = sqrt(C^2 - ||clip(g_i)||_w^2)`` beside it, the longer vector still has norm at
most C: one Gaussian releases both sums for the price of the gradient's.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dp_ilg.clipping.adding.sum_error import COEFFICIENT_ERROR, SUM_ERROR
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.clipping.scores.table import Score, l2_shares
from dp_ilg.geometry import grid
from dp_ilg.geometry.rounding import weighted_norm_rounding

MARGIN = 2.0**-17
"""Part of C that is kept free in gradient and slack, for the grid of their noise."""
MOST_NOISE = 500.0
"""Up to this noise multiplier `MARGIN` covers what the grid rounds by."""


SLACK = Score(l2_shares, name="slack", of_slack=True)
"""Sums slack in place of a score. No row of `SCORES`: it says nothing of groups."""


def sum_slack(
    lengths: Float[Array, " batch"], present: Bool[Array, " batch"], groups: int
) -> dict[str, Array]:
    """Sum over examples of their slack, in units of C, as fields of a `ClippedGrad`.

    Args:
        lengths: of the clipped examples in the geometry's norm, over C, as computed.
        present: False for padding and for examples without a finite gradient.
        groups: of the geometry.

    Returns:
        `layer_shares` and `shares_remainder`; the first entry is the sum, the others 0.

    Privacy: adding or removing one example moves the clipped sum by D C and this by s,
    and ``D^2 + s^2 <= (1 - MARGIN)^2`` wherever s is not 0, and D is at most 1 where it
    is. Proof. The sum moves by at most the clipped example's true length and the
    rounding of sums, so ``D <= b - MARGIN`` with b the computed length plus what
    coefficients, norm and sums may be off by, plus `MARGIN`. The slack is
    ``s <= (1 - MARGIN) sqrt(1 - b^2)``, 0 where b reaches 1, and cut to a public step
    towards zero. Then ``D^2 + s^2 <= (b - m)^2 + (1 - m)^2 (1 - b^2)``, which is at
    most ``(1 - m)^2`` since ``b - m <= (1 - m) b`` for b up to 1.

    Example:
        >>> found = sum_slack(jnp.array([0.6, 1.0, 0.0]), jnp.array([True] * 3), 2)
        >>> [round(float(x), 4) for x in found["layer_shares"]]
        [1.8, 0.0]
    """
    off = 2 * (weighted_norm_rounding(groups, lengths.dtype) + COEFFICIENT_ERROR)
    room = SUM_ERROR + MARGIN + 2.0**-20
    reached = lengths * np.float32(1 + off) + np.float32(room)
    reached = jnp.where(jnp.isfinite(reached), jnp.minimum(reached, 1), 1)
    slack = jnp.sqrt((1 - reached) * (1 + reached))
    slack = jnp.where(present, slack * np.float32(1 - MARGIN - 2.0**-20), 0)
    with wide():
        step = np.float64(grid.SHARE_STEP)
        total = jnp.sum(jnp.trunc(widened(slack) / step) * step, axis=0)
        high, low = grid.split_shares(total)
        first = jnp.arange(groups) == 0
        high, low = (jnp.where(first, x, jnp.zeros_like(x)) for x in (high, low))
    return {"layer_shares": high, "shares_remainder": low}
