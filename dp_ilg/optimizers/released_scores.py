"""The charged release of a step's scores: their sum, and noise of its own key."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad
from dp_ilg.geometry.seal import sound
from dp_ilg.noise.add_noise import multiplier_at
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import check_multiplier, grid_of, noised
from dp_ilg.noise.secure import check_draws, given_scores

_SCORE_TAG = 0x5C04E


def released_scores(
    clipped: ClippedGrad,
    plan: PrivacyPlan,
    state: Any,
    noise: Any,
) -> tuple[Array, Array]:
    """The mean score with this step's noise, and the variance of that noise.

    Args:
        clipped: the sum of the step, scores included.
        plan: tau_t and the expected batch size.
        state: of the scorer: its key, and which step this is.
        noise: draws from outside, or None.

    Returns:
        The release ``[groups]``, and the variance of each entry.

    Raises:
        ValueError: for draws that are not this step's, or too much noise for the grid.

    Privacy: one Gaussian with multiplier ``plan.score_noise_multipliers[t]``: one
    example moves the sum by at most 1.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> params = {"a": jnp.ones(3), "b": jnp.ones(5)}
        >>> scorer = dp_ilg.score_layer_importance("paper", plan, key=jax.random.key(1))
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> nothing = ClippedGrad(params, jnp.zeros(2), geometry, 1.0)
        >>> found, variance = released_scores(nothing, plan, scorer.init(params), None)
        >>> found.shape, bool(variance > 0)
        ((2,), True)
    """
    tau = multiplier_at(plan.score_noise_multipliers, state.step)
    tau = jnp.where(sound(clipped), tau, jnp.nan)
    shares = clipped.layer_shares
    check_multiplier(float(plan.score_noise_multipliers.max()), shares.size)
    check_draws(noise, plan.exact_noise)
    key = jax.random.fold_in(jax.random.fold_in(state.key, _SCORE_TAG), state.step)
    draw = array_steps(key, shares.shape)
    if noise is not None:
        draw, right = given_scores(noise, state.step, shares.shape)
        tau = jnp.where(right, tau, jnp.nan)
    grid = grid_of(1.0, tau, shares.size)
    total = noised(shares, clipped.shares_remainder, grid, draw)
    return total / plan.batch_size, jnp.square(tau / plan.batch_size)
