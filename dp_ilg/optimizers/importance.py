"""Layer importance: private scores, and the weights that follow from them.

Importance I_j is an estimate of the norm of layer j's per-example gradient, or of
another score of it. It comes from a charged score (a second Gaussian on the step's own
Poisson sample, accounted with the gradient as one), from public constants, or from past
noisy gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.clipping.scores.table import as_score
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.geometry import Geometry, public_values, scaled_to_profile
from dp_ilg.geometry.groups import Groups, accumulator
from dp_ilg.geometry.layers import group
from dp_ilg.geometry.rules import Rule, as_rule, check_rule, drops
from dp_ilg.geometry.seal import check_clipped
from dp_ilg.noise.add_noise import fresh_key, noise_stddev
from dp_ilg.optimizers.released_scores import released_scores


class ScoreLayerImportanceState(NamedTuple):
    """What earlier releases say of the layers; nothing of the current batch.

    Attributes:
        key: secret key of the score noise (None if the source is free).
        step: which step comes next.
        average: running average of the released statistic ``[groups]``.
        variance: variance of `average` that the known noise explains.
        shares: importance shares ``I_j^2 / sum I^2``.
        geometry: weights for the next step's clip.
    """

    key: Any
    step: Any
    average: Any
    variance: Any
    shares: Any
    geometry: Geometry


def score_layer_importance(
    rule: str | Rule,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
    score: Any = "l2",
) -> PrivateTransformation:
    """Releases a noisy score of each layer and sets the next step's geometry by it.

    Every example contributes a vector of norm at most 1, by default the unit vector
    ``u_i = (||g_i^j||)_j / ||g_i||``; their sum plus ``tau_t xi`` is released, divided
    by the expected batch size, averaged over steps, rid of the known noise variance and
    floored. A layer's importance is this mean score. Until the first release all
    weights are 1.

    Args:
        rule: a name of `RULES` or a function ``(importance, sizes) -> weights``.
        plan: tau_t; with a score budget of 0 the weights stay 1.
        key: PRNG key, secret; not the one of the noise.
        layers: what a layer is, see `dp_ilg.layers`.
        ema_decay: how much of the running average a step keeps.
        floor: smallest importance, as a fraction of the whole gradient's norm.
        score: how important an example finds each layer: a name of
            `dp_ilg.clipping.scores.table.SCORES` or a function of its statistics. It
            travels to the clip with the geometry. Weights are scaled so that an example
            whose norms follow the importance keeps its norm: with "l2" that is an
            average one; with others the clip norm means somewhat more or less.

    Returns:
        A transformation that lets the `ClippedGrad` through and holds the geometry.

    Raises:
        ValueError: for an unknown rule, layering or score, or fractions outside (0, 1).
        TypeError: for a bad key.

    Privacy: a Gaussian with multiplier ``plan.score_noise_multipliers[t]`` on the same
    Poisson sample as the gradient; the clip bounds every score to norm 1, whoever wrote
    it. ``plan.noise_multipliers`` is the one multiplier of
    both together; two separate Poisson events would under-report.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> score = score_layer_importance("paper", plan, key=jax.random.key(1))
        >>> state = score.init({"a": jnp.ones(3), "b": jnp.ones(5)})
        >>> score.geometry(state).weights.tolist()
        [1.0, 1.0]

    Reference: Li et al. 2024, section 4 (importance as the layer's L2 norm); the score
    and its accounting are in docs/idea.md.
    """
    key = validation.key("key", key)
    facts = ClipFacts(score=as_score(score))
    chosen, decay, floor = _checked(rule, ema_decay, floor)

    def init(params: Params) -> ScoreLayerImportanceState:
        return _initial(group(params, layers), fresh_key(key), chosen)

    def update(
        updates: Any,
        state: ScoreLayerImportanceState,
        params: Params | None = None,
        *,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[ClippedGrad, ScoreLayerImportanceState]:
        del params, extra
        groups = state.geometry.groups
        check_clipped(updates, groups, "score_layer_importance", "scored groups")
        if plan.score_budget == 0:
            return updates, state._replace(step=state.step + 1)
        released, variance = released_scores(updates, plan, state, noise)
        state = _averaged(state, released, variance, decay)
        level, unexplained = _unbiased(state, decay)
        squares = jnp.square(jnp.maximum(level, 0)) - unexplained
        return updates, _weighted(state, squares, chosen, floor, updates.geometry)

    return _scorer(init, update, key, plan, facts)


def score_released_gradients(
    rule: str | Rule,
    plan: PrivacyPlan,
    *,
    layers: Any = "module",
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
) -> PrivateTransformation:
    """Sets the next geometry from past noisy gradients alone, at no cost.

    Goes behind `add_importance_noise`. The squared norm of a layer's released
    gradient, less the known noise energy, averaged over steps, stands for its
    importance. It sees the norm of the *mean* gradient and is far noisier than a
    charged score in large layers.

    Args:
        rule: as in `score_layer_importance`.
        plan: knows the noise that is in the release.
        layers: what a layer is.
        ema_decay: how much of the running average a step keeps.
        floor: smallest importance, as a fraction of the whole.

    Returns:
        A transformation that lets the release through and holds the geometry.

    Raises:
        ValueError: as in `score_layer_importance`.

    Privacy: post-processing of what was released anyway; make the plan with
    ``score_budget=0``, since nothing is spent here.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, score_budget=0)
        >>> score = score_released_gradients("paper", plan)
        >>> score.geometry(score.init({"a": jnp.ones(3)})).weights.tolist()
        [1.0]
    """
    chosen, decay, floor = _checked(rule, ema_decay, floor)
    if drops(chosen):
        raise ValueError(
            "top_k drops layers, and a dropped layer releases nothing that could bring "
            "it back; take source 'scores', which scores all layers at every step."
        )

    def init(params: Params) -> ScoreLayerImportanceState:
        return _initial(group(params, layers), None, chosen)

    def update(
        updates: Params,
        state: ScoreLayerImportanceState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        l2_clip_norm: Any = None,
        **extra: Any,
    ) -> tuple[Params, ScoreLayerImportanceState]:
        del params, extra
        if geometry is None or l2_clip_norm is None:
            raise ValueError(
                "score_released_gradients does not know the noise in the release; put "
                "it behind add_importance_noise in a dp_ilg.chain."
            )
        groups = state.geometry.groups
        leaves = [x.astype(accumulator(x.dtype)) for x in jax.tree.leaves(updates)]
        stddev = noise_stddev(plan, state.step, geometry, l2_clip_norm)
        sizes = jnp.array(groups.sizes, jnp.float32)
        energy = sizes * jnp.square(stddev / plan.batch_size)
        signal = jnp.square(groups.norms(leaves)).astype(jnp.float32) - energy
        state = _averaged(state, signal, jnp.zeros((), jnp.float32), decay)
        squares, _ = _unbiased(state, decay)
        return updates, _weighted(state, squares, chosen, floor)

    return _scorer(init, update, None, plan)


def set_layer_importance(
    rule: str | Rule, values: Any, *, layers: Any = "module"
) -> PrivateTransformation:
    """Fixes the geometry by public constants: one importance a layer.

    Args:
        rule: as in `score_layer_importance`.
        values: mapping from layer name to importance, or numbers in layer order;
            None means all equal.
        layers: what a layer is.

    Returns:
        A transformation that lets everything through and holds the geometry.

    Raises:
        ValueError: for an unknown rule, or values that are not positive, one a layer.

    Privacy: free, provided the constants do not come from the private data.

    Example:
        >>> import jax.numpy as jnp
        >>> fixed = set_layer_importance("paper", {"a": 3.0, "b": 4.0})
        >>> state = fixed.init({"a": jnp.ones(3), "b": jnp.ones(5)})
        >>> [round(float(s), 2) for s in fixed.importance(state)]
        [0.36, 0.64]
    """
    chosen = as_rule(rule)

    def init(params: Params) -> ScoreLayerImportanceState:
        groups = group(params, layers)
        state = _initial(groups, None, chosen)
        constants = jnp.ones(len(groups.names))
        if values is not None:
            constants = public_values("values", values, groups)
        return _weighted(state, jnp.square(constants), chosen, 0.0)._replace(
            step=state.step
        )

    def update(
        updates: Any,
        state: ScoreLayerImportanceState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Any, ScoreLayerImportanceState]:
        del params, extra
        return updates, state._replace(step=state.step + 1)

    return _scorer(init, update, None, None)


def _scorer(
    init: Callable, update: Callable, key: Any, plan: Any, facts: Any = None
) -> PrivateTransformation:
    return PrivateTransformation(
        init,
        update,
        role="score",
        key=key,
        plan=plan,
        facts=facts,
        geometry=lambda state: state.geometry,
        importance=lambda state: state.shares,
    )


def _checked(rule: str | Rule, ema_decay: Any, floor: Any) -> tuple[Rule, Any, Any]:
    validation.fraction("ema_decay", ema_decay, include_zero=True)
    validation.fraction("floor", floor)
    return as_rule(rule), ema_decay, floor


def _initial(groups: Groups, key: Any, rule: Rule) -> ScoreLayerImportanceState:
    check_rule(rule, groups.sizes)
    count = len(groups.names)
    zeros = lambda: jnp.zeros(count, jnp.float32)  # noqa: E731
    return ScoreLayerImportanceState(
        key=key,
        step=jnp.zeros((), jnp.int32),
        average=zeros(),
        variance=jnp.zeros((), jnp.float32),
        shares=zeros() + 1 / count,
        geometry=Geometry(zeros() + 1, groups, drops=drops(rule)),
    )


def _averaged(
    state: ScoreLayerImportanceState, released: Array, variance: Array, decay: Any
) -> ScoreLayerImportanceState:
    """Moves the running average, and the variance that noise alone gives it."""
    average = decay * state.average + (1 - decay) * released
    variance = decay**2 * state.variance + (1 - decay) ** 2 * variance
    return state._replace(
        step=state.step + 1,
        average=average.astype(state.average.dtype),
        variance=variance.astype(state.variance.dtype),
    )


def _unbiased(state: ScoreLayerImportanceState, decay: Any) -> tuple[Array, Array]:
    """The average and its noise variance, freed of the start at zero."""
    correction = 1 - decay ** state.step.astype(jnp.float32)
    return state.average / correction, state.variance / correction**2


def _weighted(
    state: ScoreLayerImportanceState,
    squares: Array,
    rule: Rule,
    floor: Any,
    geometry: Geometry | None = None,
) -> ScoreLayerImportanceState:
    """Floors and normalises the squared importance and applies the rule.

    Where `geometry`, that of the clip, has maps, the size of a group is its noise
    energy.
    """
    total = jnp.sum(jnp.maximum(squares, 0))
    known = jnp.isfinite(total) & (total > 0)
    shares = jnp.where(known, jnp.maximum(squares, 0) / total, state.shares)
    shares = jnp.maximum(shares, floor**2)
    shares = shares / jnp.sum(shares)
    sizes = (geometry or state.geometry).noise_energies()
    raw = rule(jnp.sqrt(shares), sizes)
    weights = scaled_to_profile(raw, shares, drops(rule)).astype(jnp.float32)
    geometry = dataclasses.replace(state.geometry, weights=weights)
    return state._replace(shares=shares.astype(jnp.float32), geometry=geometry)
