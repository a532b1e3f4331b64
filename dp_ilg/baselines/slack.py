"""A clip norm that follows the slack of clipped examples, at no cost in privacy.

The released coordinate is part of the gradient's own Gaussian, see
`dp_ilg.clipping.scores.slack`; so it spends no score budget and changes no multiplier.
As for quantiles (`dp_ilg.baselines.quantile`), a threshold C_t is a geometry whose
weights are all ``C_t / C``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from optax import scale_by_adam

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.baselines.plain import descend, keys
from dp_ilg.baselines.quantile import moved, shares_of
from dp_ilg.clipping.clip import clip_per_example
from dp_ilg.clipping.scores.slack import MOST_NOISE, SLACK
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.seal import check_clipped, sound
from dp_ilg.noise.add_noise import add_importance_noise, fresh_key, multiplier_at
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import grid_of, noised
from dp_ilg.noise.secure import check_draws, given_scores
from dp_ilg.optimizers.chains import chain

_SLACK_TAG = 0x51ACC
_WHOSE = "groups of the thresholds"


class AdaptBySlackState(NamedTuple):
    """What earlier releases say of the slack; nothing of the current batch.

    Attributes:
        key: secret key of the slack's noise.
        step: which step comes next.
        slack: the last released mean slack, in clip norms; between 0 and 1 but for
            noise.
        geometry: thresholds of the next step: ``C w``.
    """

    key: Any
    step: Any
    slack: Any
    geometry: Geometry


def adapt_by_slack(
    plan: PrivacyPlan,
    *,
    key: Any,
    target: Any = 0.3,
    step_size: Any = 0.2,
    layers: Any = "module",
) -> PrivateTransformation:
    """Moves the clip norm until the mean slack of clipped examples is a target.

    An example of norm r C has the slack ``sqrt(1 - min(r, 1)^2)``: 0 if it is clipped,
    nearly 1 if it is far shorter than C. The mean of it is released in the gradient's
    own Gaussian, and the threshold is multiplied by ``exp(-step_size (mean - target))``
    : with much slack it falls, with none it rises. It starts at ``plan.l2_clip_norm``
    and stays within a factor of 10,000.

    Args:
        plan: sigma_t. A score budget, if there is one, is not spent here.
        key: PRNG key, secret; not the one of the noise.
        target: mean slack to aim at, in clip norms. About 0.3 is half of the examples
            clipped, where norms spread by a factor of two or so.
        step_size: how fast the threshold moves, on the log scale.
        layers: what a group is, see `dp_ilg.layers`.

    Returns:
        A transformation that lets the `ClippedGrad` through and holds the geometry; it
        stands between `clip_per_example` and `add_importance_noise`.

    Raises:
        ValueError: for a target outside (0, 1), a step size that is not positive, a
            noise multiplier above 500, or an update whose sum holds another score.
        TypeError: for a bad key, or an update that is not a `ClippedGrad`.

    Privacy: gradient and slack of one example are together a vector of norm at most C
    (proof: `dp_ilg.clipping.scores.slack.sum_slack`), and both get noise of the
    standard deviation ``sigma_t C`` in the geometry's unit, so that both releases are
    one Gaussian with ``plan.gradient_noise_multipliers[t]`` for adding or removing one
    example: what is accounted for the gradient alone. Put on their grids of 2^-27
    standard deviations, sums of d and 1 coordinates move by at most
    ``2.1 sqrt(d) 2^-27`` and ``2.1 2^-27`` more; the first is in the noise already, and
    the second adds at most ``2.1 2^-28`` standard deviations to the length of the pair,
    against the 2^-17 of ``1 / sigma`` that are kept free.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=10,
        ...     num_examples=1000, batch_size=100, score_budget=0, l2_clip_norm=3.0)
        >>> adapt = adapt_by_slack(plan, key=jax.random.key(1))
        >>> state = adapt.init({"a": jnp.ones(3), "b": jnp.ones(5)})
        >>> (plan.l2_clip_norm * adapt.geometry(state).weights).tolist()
        [3.0, 3.0]

    Reference: the idea is that of Zou et al. 2026 (SlaClip, ICML), of which we have
    read the abstract; coordinate, proof and rule of motion here are ours.
    """
    key = validation.key("key", key)
    validation.fraction("target", target)
    validation.positive("step_size", step_size)
    _check_noise(plan)

    def init(params: Params) -> AdaptBySlackState:
        geometry = Geometry.uniform(params, layers)
        start = jnp.zeros((), jnp.int32), jnp.full((), target, jnp.float32)
        return AdaptBySlackState(fresh_key(key), *start, geometry)

    def update(
        updates: Any,
        state: AdaptBySlackState,
        params: Params | None = None,
        *,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[ClippedGrad, AdaptBySlackState]:
        del params, extra
        _check_clipped(updates, state)
        mean = _released(updates, plan, state, noise) / plan.batch_size
        factor = jnp.exp(-step_size * (mean - target))
        geometry = moved(state.geometry, updates.geometry.weights * factor)
        return updates, AdaptBySlackState(state.key, state.step + 1, mean, geometry)

    return PrivateTransformation(
        init,
        update,
        role="score",
        key=key,
        plan=plan,
        facts=ClipFacts(score=SLACK),
        geometry=lambda state: state.geometry,
        importance=lambda state: shares_of(state.geometry),
    )


def slack_clipping(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    target: Any = 0.3,
    step_size: Any = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """Slack clipping: the clip norm follows the mean slack, for nothing; then Adam.

    See `adapt_by_slack`.

    Args:
        learning_rate: as in `dp_ilg.baselines.plain.dp_sgd`.
        plan: without score budget; its C is where the threshold starts.
        key: PRNG key, secret.
        layers: as in `dp_ilg.baselines.plain.dp_sgd`.
        target: mean slack to aim at.
        step_size: how fast the threshold moves, on the log scale.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan; the slack is a coordinate of the gradient's
    Gaussian and costs nothing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = slack_clipping(1e-3, plan, key=jax.random.key(0))

    Reference: after Zou et al. 2026 (SlaClip); see `adapt_by_slack`.
    """
    slack_key, noise_key = keys(key)
    own = dict(target=target, step_size=step_size, layers=layers)
    return chain(
        clip_per_example(plan.l2_clip_norm),
        adapt_by_slack(plan, key=slack_key, **own),
        add_importance_noise(plan, key=noise_key, layers=layers),
        scale_by_adam(b1, b2, eps),
        descend(learning_rate),
    )


def _check_noise(plan: PrivacyPlan) -> None:
    most = float(plan.gradient_noise_multipliers.max())
    if most > MOST_NOISE:
        raise ValueError(
            f"The noise multiplier is {most:g}, but the proof for slack holds up to "
            f"{MOST_NOISE:g}; plan with less noise."
        )


def _check_clipped(updates: Any, state: AdaptBySlackState) -> None:
    check_clipped(updates, state.geometry.groups, "adapt_by_slack", _WHOSE)
    if getattr(updates.geometry.facts, "score", None) != SLACK:
        raise ValueError(
            "The ClippedGrad holds no slack, whose sum has room in the gradient's own "
            "bound; clip with this optimizer's geometry(state)."
        )


def _released(
    clipped: ClippedGrad, plan: PrivacyPlan, state: AdaptBySlackState, noise: Any
) -> Array:
    """The sum of slack with this step's noise, in units of C."""
    sigma = multiplier_at(plan.gradient_noise_multipliers, state.step)
    sigma = jnp.where(sound(clipped), sigma, jnp.nan)
    check_draws(noise, plan.exact_noise)
    key = jax.random.fold_in(jax.random.fold_in(state.key, _SLACK_TAG), state.step)
    draw = array_steps(key, ())
    if noise is not None:
        draw, right = given_scores(noise, state.step, ())
        sigma = jnp.where(right, sigma, jnp.nan)
    rest = clipped.shares_remainder
    rest = None if rest is None else rest[0]
    total = sum(x.size for x in jax.tree.leaves(clipped.gradients))
    grid = grid_of(1.0, sigma, total + 1)
    return noised(clipped.layer_shares[0], rest, grid, draw)
