"""Metrics of the training examples that one may look at: noisy means, charged.

Every example of a step gives a vector of bounded, centred metrics of norm at most 1.
Their sum over the step's own Poisson sample is released with Gaussian noise, accounted
with gradient and scores as one. Nothing here decides anything: a release is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.truncation import mean_drawn
from dp_ilg.base import (
    ClippedGrad,
    Params,
    PrivateTransformation,
    own_promotion,
)
from dp_ilg.clipping.adding.metric_sums import (
    Facts,
    Metric,
    as_metrics,
    facts_of,
    reach_of,
)
from dp_ilg.geometry.seal import sound
from dp_ilg.noise.add_noise import fresh_key, multiplier_at
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import check_multiplier, grid_of, noised
from dp_ilg.noise.secure import check_draws, given_metrics

METRIC_TAG = 0x3E7A1C
"""Sets keys and noise of metrics apart from all others."""


class Released(NamedTuple):
    """What is known of one metric; NaN before the first step and past the plan.

    Attributes:
        value: the last step's noisy mean, in the metric's own units.
        smoothed: its running average over steps.
        stderr: the standard error of `value`, from public facts alone.
        smoothed_stderr: the standard error of `smoothed`.

    Privacy: all of it is released; it may be logged and published.
    """

    value: Any
    smoothed: Any
    stderr: Any
    smoothed_stderr: Any

    def __str__(self) -> str:
        return f"{float(self.smoothed):.4g} ± {float(self.smoothed_stderr):.2g}"


class ReleaseMetricsState(NamedTuple):
    """What was released of the metrics so far; nothing of a single batch.

    Attributes:
        key: secret key of the noise.
        step: which step comes next.
        value: the last noisy means, centred and scaled to [-1, 1], ``[metrics]``.
        variance: of each of them, as far as public facts say.
        average: running average of `value`, from a start at zero.
        average_variance: of each entry of `average`.
    """

    key: Any
    step: Any
    value: Any
    variance: Any
    average: Any
    average_variance: Any


def release_metrics(
    plan: PrivacyPlan,
    metrics: Mapping[str, Metric],
    *,
    key: Any,
    smooth_steps: Any = 25,
) -> PrivateTransformation:
    """Releases noisy means of bounded metrics of the training examples.

    The bounded vectors of the step's examples, added, plus ``tau xi``, are divided by
    the *expected* batch size and moved back to the metrics' own units. That estimates
    the mean over all the training examples, at the parameters before the step, and
    never tells how many were drawn. An example without finite value counts as the
    middle of the bounds. `metrics` of the chain reads it:
    ``tx.metrics(state)["loss"].smoothed``.

    The standard errors hold for that mean: they include the noise and, at most, the
    chance of the draw, ``half sqrt((1 - q) / B)`` for bounds that are `half` away from
    their middle. The running average lags behind a mean that moves.

    Args:
        plan: tau_t; it must have a metric budget.
        metrics: name -> `Metric`, the mapping given to `dp_ilg.clipped_grad`.
        key: PRNG key, secret; not one of those of scores and noise.
        smooth_steps: over how many steps' worth the running average goes: its variance
            is that of the mean of so many steps.

    Returns:
        A transformation that lets the `ClippedGrad` through, with ``metrics(state)``;
        it stands between `clip_per_example` and `add_importance_noise`.

    Raises:
        ValueError: for a plan without metric budget, no metrics, fewer than 1 step,
            sums of other metrics, or noise too large for the grid.
        TypeError: for a bad key or mapping, or an update that was not clipped.

    Privacy: a Gaussian with multiplier ``plan.metric_noise_multipliers[t]`` on the same
    Poisson sample as the gradient; ``plan.noise_multipliers`` is the one multiplier of
    gradient, scores and metrics together. Sensitivity 1 for adding or removing one
    example, whatever the metrics' functions return. Past the plan it is NaN.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, metric_budget=0.005)
        >>> metrics = {"loss": Metric(lambda loss, aux: loss, high=4.0)}
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0), metrics=metrics)
        >>> loss = lambda p, x: jnp.square(p["w"] @ x - 1)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, metrics=metrics)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> grads = grad_fn(params, jnp.ones((100, 2)), geometry=tx.geometry(state))
        >>> updates, state = tx.update(grads, state, params)
        >>> sorted(tx.metrics(state)), bool(tx.metrics(state)["loss"].stderr < 0.7)
        (['loss'], True)

    Reference: docs/idea.md (multipliers of one sample add up as sigma^-2).
    """
    key = validation.key("key", key)
    facts = facts_of(as_metrics(metrics))
    _check(plan, facts, smooth_steps)
    decay = (smooth_steps - 1) / (smooth_steps + 1)

    def init(params: Params) -> ReleaseMetricsState:
        del params
        zeros, nothing = jnp.zeros(len(facts), jnp.float32), jnp.zeros((), jnp.float32)
        return ReleaseMetricsState(
            key=fresh_key(key),
            step=jnp.zeros((), jnp.int32),
            value=zeros,
            variance=nothing,
            average=jnp.copy(zeros),
            average_variance=jnp.copy(nothing),
        )

    def update(
        updates: Any,
        state: ReleaseMetricsState,
        params: Params | None = None,
        *,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[ClippedGrad, ReleaseMetricsState]:
        del params, extra
        _check_sums(updates, facts)
        value, variance = _released(updates, plan, state, noise)
        return updates, _averaged(state, value, variance, decay)

    def read(state: ReleaseMetricsState) -> dict[str, Released]:
        return _in_units(state, facts, decay)

    return PrivateTransformation(
        init, update, role="metric", key=key, plan=plan, metrics=own_promotion(read)
    )


def _check(plan: PrivacyPlan, facts: Facts, smooth_steps: Any) -> None:
    validation.positive("smooth_steps", smooth_steps)
    if smooth_steps < 1:
        raise ValueError(f"smooth_steps is {smooth_steps:g}, but must be at least 1.")
    if not facts:
        raise ValueError(
            "release_metrics got no metrics; give it the mapping that clipped_grad "
            "has, or leave it out."
        )
    if plan.metric_budget == 0:
        raise ValueError(
            f"The metrics {', '.join(name for name, *_ in facts)} are to be released, "
            "but the plan's metric_budget is 0; make the plan with metric_budget=0.005."
        )
    check_multiplier(float(plan.metric_noise_multipliers.max()), len(facts))


def _check_sums(updates: Any, facts: Facts) -> None:
    if not isinstance(updates, ClippedGrad):
        raise TypeError(
            f"release_metrics got {type(updates).__name__}, not a ClippedGrad; put "
            "clip_per_example before it in the chain."
        )
    if updates.metrics is None:
        raise ValueError(
            "The clipped sum has no metrics, but the optimizer releases "
            f"{', '.join(name for name, *_ in facts)}; make it with "
            "dp_ilg.clipped_grad(..., metrics=metrics)."
        )
    if updates.metrics.facts != facts:
        raise ValueError(
            f"The clipped sum has the metrics {updates.metrics.facts}, but the "
            f"optimizer releases {facts}; give both the same metrics."
        )


def _released(
    clipped: ClippedGrad, plan: PrivacyPlan, state: ReleaseMetricsState, noise: Any
) -> tuple[Float[Array, " metrics"], Float[Array, ""]]:
    """The noisy means of the step, in [-1, 1] but for noise, and their variance."""
    sums = clipped.metrics
    count = sums.total.size
    tau = multiplier_at(plan.metric_noise_multipliers, state.step)
    tau = jnp.where(sound(clipped), tau, jnp.nan)
    check_draws(noise, plan.exact_noise)
    key = jax.random.fold_in(jax.random.fold_in(state.key, METRIC_TAG), state.step)
    draw = array_steps(key, (count,))
    if noise is not None:
        draw, right = given_metrics(noise, state.step, count)
        tau = jnp.where(right, tau, jnp.nan)
    grid = grid_of(1.0, tau, count)
    total = noised(sums.total, sums.remainder, grid, draw)
    size, chance = _draw_of(plan)
    scale = np.float32(1 / (reach_of(count) * size))
    stddev = jnp.where(grid.valid, jnp.where(grid.bare, 0, grid.stddev), jnp.nan)
    return total * scale, jnp.square(stddev * scale) + np.float32(chance)


def _draw_of(plan: PrivacyPlan) -> tuple[float, float]:
    """Expected size of a draw, and the most its chance adds to a mean's variance.

    Of independent draws with probability q, a sum of numbers in [-1, 1] has variance
    ``q (1 - q)`` times their squares, at most ``B (1 - q)``. A draw that is cut to a
    size M is M of N without replacement: ``E[M (1 - M / N)] N / (N - 1)`` for how the
    numbers differ and ``Var M``, which is below ``B (1 - q)``, for their mean.
    """
    whole, rate, most = plan.num_examples, plan.sampling_prob, plan.max_batch_size
    spread, size = plan.batch_size * (1 - rate), float(plan.batch_size)
    if most is not None:
        size = mean_drawn(whole, rate, most)
        spread = max(spread, size * (1 - size / whole) * whole / max(1, whole - 1))
    return size, spread / size**2


def _averaged(
    state: ReleaseMetricsState, value: Array, variance: Array, decay: float
) -> ReleaseMetricsState:
    average = decay * state.average + (1 - decay) * value
    spread = decay**2 * state.average_variance + (1 - decay) ** 2 * variance
    return state._replace(
        step=state.step + 1,
        value=value.astype(jnp.float32),
        variance=variance.astype(jnp.float32),
        average=average.astype(jnp.float32),
        average_variance=spread.astype(jnp.float32),
    )


def _in_units(
    state: ReleaseMetricsState, facts: Facts, decay: float
) -> dict[str, Released]:
    """The releases by name, in the metrics' own units, freed of the start at zero."""
    weight = 1 - decay ** jnp.asarray(state.step, jnp.float32)
    smoothed = state.average / weight
    known = jnp.where(state.step > 0, 1, jnp.nan)
    spread = [state.variance * known, state.average_variance / weight**2]
    errors = jnp.sqrt(jnp.stack(spread))
    found = {}
    for k, (name, low, high) in enumerate(facts):
        middle, half = (low + high) / 2, (high - low) / 2
        last, mean = (middle + half * x[k] for x in (state.value * known, smoothed))
        found[name] = Released(last, mean, *(half * error for error in errors))
    return found
