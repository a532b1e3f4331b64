"""Scales of single entries from past releases: a row a published method.

Each row is a pair of formulas, what to average over the releases and how the average
becomes a scale; `scale_coordinates` keeps the averages and hands the next step its
`Coordinates`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry.coordinates import Coordinates
from dp_ilg.geometry.geometry import LARGEST_RATIO, Geometry
from dp_ilg.geometry.groups import Groups, accumulator
from dp_ilg.geometry.layers import group
from dp_ilg.noise.add_noise import noise_stddev


class CoordinateRule(NamedTuple):
    """How releases become scales; all functions work entry by entry.

    Attributes:
        statistic: ``(release, mean, noise_variance) -> what is averaged``; the mean is
            that of the releases before.
        scale: ``(average, floor) -> b``, positive.
        centred: whether the mean of past releases is the centre a.
        profile: the power of b that is the squared size the rule believes an entry
            has; b is then scaled so that such an example keeps its L2 norm. None
            leaves b as it is, so that C is in units of the scaled gradient.
    """

    statistic: Callable[[Array, Array, Array], Array]
    scale: Callable[[Array, Any], Array]
    centred: bool
    profile: int | None


def _square(release: Array, mean: Array, noise_variance: Array) -> Array:
    return jnp.square(release)


def _spread(release: Array, mean: Array, noise_variance: Array) -> Array:
    """Squared distance from the mean without the known noise, at most 10."""
    return jnp.clip(jnp.square(release - mean) - noise_variance, 0, 10)


COORDINATE_RULES = {
    "adaclip": CoordinateRule(
        _spread, lambda v, floor: jnp.maximum(v, floor**2) ** 0.25, True, 4
    ),
    "adadp": CoordinateRule(_square, lambda v, floor: jnp.sqrt(v + floor**2), False, 2),
    "scale_then_privatize": CoordinateRule(
        _square, lambda v, floor: jnp.sqrt(v) + floor, False, None
    ),
}


class ScaleCoordinatesState(NamedTuple):
    """Averages of the releases, and the next step's geometry.

    Attributes:
        step: which step comes next.
        mean: running mean of the releases, one array a leaf; None unless centred.
        average: running average of the row's statistic, one array a leaf.
        geometry: the next step's geometry, with its coordinates.
    """

    step: Any
    mean: Any
    average: Any
    geometry: Geometry


def scale_coordinates(
    rule: str | CoordinateRule,
    plan: PrivacyPlan,
    *,
    layers: Any = "module",
    mean_decay: Any = 0.99,
    decay: Any = 0.9,
    floor: Any = 1e-6,
) -> PrivateTransformation:
    """Sets the scale (and centre) of every entry for the next step's clip.

    Goes behind `add_importance_noise`, in place of a scorer. With `clipped_grad` the
    gradients of single examples are then formed, whatever the engine.

    Args:
        rule: "adaclip", "adadp", "scale_then_privatize" or a `CoordinateRule`.
        plan: knows the noise that is in the release.
        layers: what a group is; all groups have weight 1.
        mean_decay: how much of the running mean a step keeps.
        decay: how much of the running average a step keeps.
        floor: in units of a gradient's entry; entries far below it are alike.

    Returns:
        A transformation that lets the release through and holds the geometry.

    Raises:
        ValueError: for an unknown rule, decays outside [0, 1), a floor that is not
            positive, or a place in the chain without noise before it.

    Privacy: post-processing of the releases; nothing is spent, so make the plan with
    ``score_budget=0``. Each step is the plan's Gaussian whatever the scales, for
    adding or removing one example.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, score_budget=0)
        >>> tx = dp_ilg.chain(
        ...     dp_ilg.clip_per_example(1.0),
        ...     dp_ilg.add_importance_noise(plan, key=jax.random.key(0)),
        ...     scale_coordinates("adadp", plan))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> _, state = tx.update({"w": jnp.ones((3, 2))}, state, params)
        >>> [b.shape for b in tx.geometry(state).coordinates.scale]
        [(2,)]

    Reference: Pichapati et al. 2019 (AdaCliP), Xu et al. 2020 (ADADP), Ganesh et al.
    2025 (scale-then-privatize); see the rows of `dp_ilg.baselines`.
    """
    chosen = _as_rule(rule)
    validation.fraction("mean_decay", mean_decay, include_zero=True)
    validation.fraction("decay", decay, include_zero=True)
    validation.positive("floor", floor)
    decays = (mean_decay, decay)

    def init(params: Params) -> ScaleCoordinatesState:
        return _initial(chosen, params, group(params, layers), floor)

    def update(
        updates: Params,
        state: ScaleCoordinatesState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        l2_clip_norm: Any = None,
        **extra: Any,
    ) -> tuple[Params, ScaleCoordinatesState]:
        del params, extra
        noise = _known_noise(plan, state.step, geometry, l2_clip_norm)
        releases = jax.tree.leaves(updates)
        mean, average = _averaged(chosen, state, releases, noise, decays)
        new = _geometry(chosen, state.geometry.groups, average, mean, floor)
        return updates, ScaleCoordinatesState(state.step + 1, mean, average, new)

    return PrivateTransformation(
        init,
        update,
        role="score",
        plan=plan,
        geometry=lambda state: state.geometry,
        importance=_importance,
    )


def _initial(
    rule: CoordinateRule, params: Params, groups: Groups, floor: Any
) -> ScaleCoordinatesState:
    """Averages of nothing, and the scales that they make."""
    leaves = jax.tree.leaves(params)
    zeros = tuple(jnp.zeros(x.shape, accumulator(x.dtype)) for x in leaves)
    mean = tuple(map(jnp.zeros_like, zeros)) if rule.centred else None
    geometry = _geometry(rule, groups, zeros, mean, floor)
    return ScaleCoordinatesState(jnp.zeros((), jnp.int32), mean, zeros, geometry)


def _known_noise(
    plan: PrivacyPlan, step: Any, geometry: Geometry | None, l2_clip_norm: Any
) -> list[Array]:
    """The noise variance of every released entry of a step."""
    if geometry is None or l2_clip_norm is None:
        raise ValueError(
            "scale_coordinates does not know the noise in the release; put it "
            "behind add_importance_noise in a dp_ilg.chain."
        )
    stddev = noise_stddev(plan, step, geometry, l2_clip_norm)
    return entry_variances(geometry, stddev / plan.batch_size)


def entry_variances(geometry: Geometry, stddev: Array) -> list[Array]:
    """Known noise variance of every released entry, broadcastable against its leaf.

    Args:
        geometry: of the clip.
        stddev: of the noise on the mean in the geometry's coordinates, ``[groups]``.

    Returns:
        One array a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> there = Coordinates((jnp.array([1.0, 3.0]),))
        >>> geometry = Geometry(jnp.ones(1), group({"w": jnp.ones(2)}), there)
        >>> entry_variances(geometry, jnp.array([2.0]))[0].tolist()
        [4.0, 36.0]
    """
    known = geometry.groups.expand(jnp.square(stddev))
    if geometry.coordinates is None:
        return known
    scales = geometry.coordinates.scale
    return [k * jnp.square(b) for k, b in zip(known, scales, strict=True)]


def _averaged(
    rule: CoordinateRule,
    state: ScaleCoordinatesState,
    releases: list[Array],
    noise: list[Array],
    decays: tuple[Any, Any],
) -> tuple[Any, Any]:
    """Moves the averages by one release; one that is not finite moves nothing."""
    means = state.mean or (jnp.zeros(()),) * len(releases)

    def blend(old: Array, new: Array, decay: Any) -> Array:
        return jnp.where(jnp.isfinite(new), decay * old + (1 - decay) * new, old)

    wide = [x.astype(v.dtype) for x, v in zip(releases, state.average, strict=True)]
    found = map(rule.statistic, wide, means, noise)
    average = tuple(map(lambda v, s: blend(v, s, decays[1]), state.average, found))
    if state.mean is None:
        return None, average
    return tuple(map(lambda m, x: blend(m, x, decays[0]), means, wide)), average


def _geometry(
    rule: CoordinateRule, groups: Groups, average: Any, mean: Any, floor: Any
) -> Geometry:
    trained = [bool(leaf.groups) for leaf in groups.leaves]
    scales = [
        rule.scale(v, floor).astype(v.dtype) if on else jnp.ones_like(v)
        for v, on in zip(average, trained, strict=True)
    ]
    if rule.profile is not None:
        own = [b for b, on in zip(scales, trained, strict=True) if on]
        shape = _keeping_norm(own, rule.profile)
        scales = [shape(b) if on else b for b, on in zip(scales, trained, strict=True)]
    weights = jnp.ones(len(groups.names), jnp.float32)
    return Geometry(weights, groups, Coordinates(tuple(scales), mean))


def _keeping_norm(scales: list[Array], power: int) -> Callable[[Array], Array]:
    """Scales b by one factor so that entries of squared size ``b^power`` keep |g|.

    Entries are first held within a factor of 10,000 of the largest.
    """
    top = jnp.max(jnp.stack([jnp.max(b, initial=0) for b in scales]))
    relative = lambda b: jnp.maximum(b / top, 1 / LARGEST_RATIO)  # noqa: E731
    powers = lambda p: sum(jnp.sum(relative(b) ** p) for b in scales)  # noqa: E731
    factor = jnp.sqrt(powers(power - 2) / powers(power))
    return lambda b: (relative(b) * factor).astype(b.dtype)


def _importance(state: ScaleCoordinatesState) -> Array:
    """Shares of the groups' squared scales."""
    norms = state.geometry.groups.norms(state.geometry.coordinates.scale)
    return jnp.square(norms) / jnp.sum(jnp.square(norms))


def _as_rule(rule: str | CoordinateRule) -> CoordinateRule:
    if isinstance(rule, CoordinateRule):
        return rule
    if not isinstance(rule, str) or rule not in COORDINATE_RULES:
        raise ValueError(
            f"rule is {rule!r}, but must be one of {sorted(COORDINATE_RULES)} or a "
            "CoordinateRule."
        )
    return COORDINATE_RULES[rule]
