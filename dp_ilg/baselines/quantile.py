"""Adaptive clip norms: a threshold follows a quantile of the gradient norms.

A threshold is a weight. Clipping to ``C_t`` with noise ``sigma C_t`` is clipping to the
plan's C with noise ``sigma C w`` in a geometry whose weights are all ``C_t / C``; a
threshold for every group is a weight for every group. So all that happens here is that
a noised count, charged to the plan's score budget, sets the next step's geometry.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.geometry.geometry import LARGEST_RATIO, Geometry
from dp_ilg.geometry.seal import check_clipped, sound
from dp_ilg.noise.add_noise import fresh_key, multiplier_at
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import check_multiplier, grid_of, noised
from dp_ilg.noise.secure import check_draws, given_scores

_COUNT_TAG = 0xC0047
_WHOSE = "groups of the thresholds"


class AdaptClipNormState(NamedTuple):
    """What earlier counts say of the norms; nothing of the current batch.

    Attributes:
        key: secret key of the counts' noise.
        step: which step comes next.
        fitting: the last released estimate of the share of examples within the
            threshold, one number, or one a group.
        geometry: thresholds of the next step: ``C w``, or ``C w_j / sqrt(groups)``.
    """

    key: Any
    step: Any
    fitting: Any
    geometry: Geometry


def adapt_clip_norm(
    plan: PrivacyPlan,
    *,
    key: Any,
    quantile: Any = 0.5,
    step_size: Any = 0.2,
    each_group: bool = False,
    layers: Any = "module",
) -> PrivateTransformation:
    """Moves the clip norm towards a quantile of the examples' gradient norms.

    Every example counts 1/2 if its norm is within the threshold and -1/2 if not. The
    sum plus noise, divided by the expected batch size, estimates the share of examples
    that fit, and the threshold is multiplied by
    ``exp(-step_size (share - quantile))``. It starts at ``plan.l2_clip_norm`` (for
    groups: divided by the root of their number) and stays within a factor of 10,000.

    Args:
        plan: tau_t; it must have a score budget.
        key: PRNG key, secret; not the one of the noise.
        quantile: which share of the examples should not be clipped.
        step_size: how fast the threshold moves, on the log scale.
        each_group: a threshold for every group (with ``clip_mode="per_layer"``), in
            place of one for the whole gradient.
        layers: what a group is, see `dp_ilg.layers`.

    Returns:
        A transformation that lets the `ClippedGrad` through and holds the geometry; it
        stands between `clip_per_example` and `add_importance_noise`.

    Raises:
        ValueError: for fractions outside (0, 1), or a plan without score budget.
        TypeError: for a bad key, or an update that is not a `ClippedGrad`.

    Privacy: adding or removing one example moves the count by 1/2 (the counts of J
    groups by ``sqrt(J) / 2`` in L2), and the noise is that times
    ``plan.score_noise_multipliers[t]``, on the same Poisson sample as the gradient.
    ``plan.noise_multipliers`` is the one multiplier of both together.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, l2_clip_norm=3.0)
        >>> adapt = adapt_clip_norm(plan, key=jax.random.key(1))
        >>> state = adapt.init({"a": jnp.ones(3), "b": jnp.ones(5)})
        >>> (plan.l2_clip_norm * adapt.geometry(state).weights).tolist()
        [3.0, 3.0]

    Reference: Andrew et al. 2021, Algorithm 1; He et al. 2023 (group-wise), whose
    "equal budget" is this noise; docs/idea.md has the accounting.
    """
    key = validation.key("key", key)
    _check(plan, quantile, step_size)

    def init(params: Params) -> AdaptClipNormState:
        geometry = Geometry.uniform(params, layers)
        count = geometry.weights.shape if each_group else ()
        fitting = jnp.full(count, quantile, jnp.float32)
        start = jnp.zeros((), jnp.int32)
        return AdaptClipNormState(fresh_key(key), start, fitting, geometry)

    def update(
        updates: Any,
        state: AdaptClipNormState,
        params: Params | None = None,
        *,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[ClippedGrad, AdaptClipNormState]:
        del params, extra
        counts = _counts(updates, state, each_group)
        released = _released(counts, plan, state, noise)
        released = jnp.where(sound(updates), released, jnp.nan)
        fitting = 0.5 + released / plan.batch_size
        factor = jnp.exp(-step_size * (fitting - quantile))
        geometry = moved(state.geometry, updates.geometry.weights * factor)
        return updates, AdaptClipNormState(state.key, state.step + 1, fitting, geometry)

    return PrivateTransformation(
        init,
        update,
        role="score",
        key=key,
        plan=plan,
        geometry=lambda state: state.geometry,
        importance=lambda state: shares_of(state.geometry),
    )


def _check(plan: PrivacyPlan, quantile: Any, step_size: Any) -> None:
    validation.fraction("quantile", quantile)
    validation.positive("step_size", step_size)
    if plan.score_budget == 0:
        raise ValueError(
            "adapt_clip_norm releases counts, but the plan's score_budget is 0; make "
            "the plan with score_budget=0.01."
        )


def _released(
    counts: Array, plan: PrivacyPlan, state: AdaptClipNormState, noise: Any
) -> Array:
    """The counts with this step's noise, which may be given from outside."""
    tau = multiplier_at(plan.score_noise_multipliers, state.step)
    key = jax.random.fold_in(jax.random.fold_in(state.key, _COUNT_TAG), state.step)
    draw = None
    check_multiplier(float(plan.score_noise_multipliers.max()), counts.size)
    check_draws(noise, plan.exact_noise)
    if noise is not None:
        draw, right = given_scores(noise, state.step, counts.shape)
        tau = jnp.where(right, tau, jnp.nan)
    return noisy_counts(counts, tau, key, draw)


def moved(geometry: Geometry, weights: Array) -> Geometry:
    """Other weights within bounds; one that is not finite stays as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> there = Geometry.uniform({"w": jnp.ones(2)})
        >>> moved(there, jnp.array([jnp.nan])).weights.tolist()
        [1.0]
    """
    weights = jnp.clip(weights, 1 / LARGEST_RATIO, LARGEST_RATIO)
    weights = jnp.where(jnp.isfinite(weights), weights, geometry.weights)
    return Geometry(weights, geometry.groups)


def noisy_counts(
    counts: Float[Array, "*groups"],
    noise_multiplier: Any,
    key: Array,
    draw: Any = None,
) -> Float[Array, "*groups"]:
    """Counts of -1/2 and 1/2 for each example, with noise for their sensitivity.

    Args:
        counts: one number, or one for each of J groups.
        noise_multiplier: tau; the noise has deviation ``tau sqrt(J) / 2``.
        key: used for this step only.
        draw: int32 steps of `dp_ilg.noise.normal.array_steps` to take instead of
            drawing under the key.

    Returns:
        The release, float32; NaN unless the multiplier is 0 or positive and finite.

    Privacy: a Gaussian with this multiplier, added on a public grid
    (`dp_ilg.noise.release`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> noisy_counts(jnp.ones(4), 0.0, jax.random.key(0)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    sensitivity = np.float32(math.sqrt(counts.size) / 2)
    if draw is None:
        draw = array_steps(key, counts.shape)
    grid = grid_of(sensitivity, noise_multiplier, counts.size)
    return noised(counts, None, grid, draw)


def _counts(updates: Any, state: AdaptClipNormState, each_group: bool) -> Array:
    check_clipped(updates, state.geometry.groups, "adapt_clip_norm", _WHOSE)
    if updates.fits is None:
        raise ValueError(
            "The ClippedGrad has no counts of examples within the bound; make it with "
            "dp_ilg.clipped_grad or clip_per_example."
        )
    return updates.fits[1:] if each_group else updates.fits[0]


def shares_of(geometry: Geometry) -> Float[Array, " groups"]:
    """Shares of the squared thresholds, which stand for importance.

    Example:
        >>> import jax.numpy as jnp
        >>> there = Geometry.of({"a": jnp.ones(2), "b": jnp.ones(1)}, [2.0, 1.0])
        >>> [round(float(x), 2) for x in shares_of(there)]
        [0.8, 0.2]
    """
    squares = jnp.square(geometry.weights)
    return squares / jnp.sum(squares)
