"""Clipping of single examples in the geometry of the step, and their sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Params, PerExampleGrads, PrivateTransformation
from dp_ilg.clipping.adding.metric_sums import Facts, sum_metrics
from dp_ilg.clipping.adding.sum_error import COEFFICIENT_ERROR, SUM_ERROR
from dp_ilg.clipping.adding.sums import CANCELLATION, wide, widened
from dp_ilg.clipping.modes import CLIP_MODES as CLIP_MODES
from dp_ilg.clipping.modes import ClipMode, as_clip_mode, group_bounds, room
from dp_ilg.clipping.modes import joint as joint
from dp_ilg.clipping.modes import normalize as normalize
from dp_ilg.clipping.modes import per_layer as per_layer
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.clipping.scores.bounding import sum_scores
from dp_ilg.clipping.scores.slack import sum_slack
from dp_ilg.clipping.scores.table import agreed_score
from dp_ilg.geometry import grid
from dp_ilg.geometry.coordinates import enter_gradients
from dp_ilg.geometry.facts import ClipFacts, constant
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import accumulator, weighted_norm
from dp_ilg.geometry.layers import group
from dp_ilg.geometry.rounding import weighted_norm_rounding
from dp_ilg.sampling.batch import opened


def clip_sum(
    per_example: PerExampleGrads,
    geometry: Geometry,
    l2_clip_norm: Any,
    mode: ClipMode,
    is_padding_example: Any = None,
    facts: Facts = (),
) -> ClippedGrad:
    """Sums clipped examples; padding and non-finite examples are absent.

    Args:
        per_example: what the engine found.
        geometry: weights released before this step.
        l2_clip_norm: bound C on one example in the geometry's norm; a traced one
            that is no positive number makes everything NaN.
        mode: how to bound.
        is_padding_example: bool ``[batch]``; True rows do not exist.
        facts: name and bounds of the metrics that the engine found values of.

    Returns:
        The `ClippedGrad`; its geometry says mode and score.

    Raises:
        ValueError: if the mask does not fit the batch.

    Groups that the geometry drops count for neither norm nor sum, but are scored; under
    "bookkeeping" their gradients are still computed, since the weights are traced.

    Privacy: sensitivity ``l2_clip_norm`` for the sum, 1 for scores and metrics and 1/2
    for each count, for adding or removing one example; nothing here is private before
    noise.
    """
    score = agreed_score(geometry, None)
    geometry = geometry.saying(ClipFacts(clip_mode=mode, score=score))
    rough = per_example.sizes / np.float32(CANCELLATION)
    norms = jnp.maximum(per_example.norms, rough.astype(per_example.norms.dtype))
    present = _present(norms, is_padding_example)
    norms = jnp.where(present[:, None], norms, 0)
    seen, weights = geometry.seen(norms), geometry.divisors()
    length = weighted_norm(seen, weights)
    present = present & jnp.isfinite(length)
    bound = jnp.asarray(l2_clip_norm, norms.dtype)
    bound = jnp.where(jnp.isfinite(bound) & (bound > 0), bound, jnp.nan)
    rounding = weighted_norm_rounding(norms.shape[-1], norms.dtype)
    slack = COEFFICIENT_ERROR + rounding + SUM_ERROR
    most = room(mode, geometry.kept(), bound * np.float32(1 - slack))
    raw = mode.coefficients(seen, weights, most)
    keep = present.reshape(-1, *[1] * (raw.ndim - 1))
    coefficients = jnp.where(keep, raw, 0)
    fields = _exact_sums(per_example, coefficients, geometry, bound)
    if score.of_slack:
        used = seen * coefficients.reshape(len(present), -1)
        shares = sum_slack(
            weighted_norm(used, weights) / bound, present, norms.shape[-1]
        )
    else:
        shares = sum_scores(score, per_example, norms, present, geometry)
    within = jnp.concatenate(
        [length[:, None] <= bound, norms <= group_bounds(weights, bound)], 1
    )
    fits = jnp.sum(jnp.where(present[:, None], within - 0.5, 0), 0, jnp.float32)
    metrics = None
    if facts:
        metrics = sum_metrics(per_example.metrics, present, facts)
    rest = dict(l2_clip_norm=bound, fits=fits, metrics=metrics)
    return ClippedGrad(**fields, **shares, geometry=geometry.forgetting(), **rest)


def _present(norms: Array, is_padding_example: Array | None) -> Array:
    """Which examples count: those that are finite and no padding."""
    present = jnp.all(jnp.isfinite(norms), axis=-1)
    if is_padding_example is None:
        return present
    mask = jnp.asarray(is_padding_example)
    if mask.shape != present.shape or mask.dtype != bool:
        raise ValueError(
            f"is_padding_example has shape {mask.shape} and dtype {mask.dtype}, "
            f"but must be bool of shape {present.shape}."
        )
    return present & ~mask


def _exact_sums(
    per_example: PerExampleGrads, coefficients: Array, geometry: Geometry, bound: Array
) -> dict[str, Any]:
    """The weighted sum on the public grid, as fields of a `ClippedGrad`."""
    steps = grid.grid_steps(geometry, bound)
    sums = per_example.weighted_sum(coefficients, steps)
    leaves, treedef = jax.tree.flatten(sums)
    facts = geometry.groups.leaves
    with wide():
        leaves = geometry.of_kept(leaves)
        exact = [
            grid.limbs(widened(x), step, accumulator(leaf.dtype))
            for leaf, x, step in zip(
                facts, leaves, grid.leaf_steps(geometry, bound), strict=True
            )
        ]
    return grid.as_fields(exact, treedef)


def clip_per_example(
    l2_clip_norm: Any, *, clip_mode: str | ClipMode = "joint"
) -> PrivateTransformation:
    """Clips per-example gradients in the geometry and sums them.

    The first link of a private chain. Its updates are per-example gradients (each
    leaf with a leading batch axis) or a `ClippedGrad`, which passes through, also
    when handed over as the extra argument ``clipped_grad=`` (``nnx.Optimizer``
    drops everything but gradients). `dp_ilg.chain` supplies ``geometry=``; under a
    plain ``optax.chain`` the caller does.

    Args:
        l2_clip_norm: bound C on one example in the geometry's norm.
        clip_mode: "joint", "normalize", "per_layer" or a `ClipMode`.

    Returns:
        A transformation to `ClippedGrad`; its update takes ``geometry=``,
        ``is_padding_example=`` and ``clipped_grad=``.

    Raises:
        ValueError: for a bad norm or mode, missing geometry, missing or unequal
            batch axes.

    Privacy: sensitivity C for adding or removing one example; no noise yet, so the
    output is not private. Padding, NaN and infinite examples contribute nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.zeros(2)}
        >>> clip = clip_per_example(1.0)
        >>> gradients = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
        >>> geometry = Geometry.uniform(params)
        >>> clipped, _ = clip.update(gradients, clip.init(params), geometry=geometry)
        >>> [round(float(x), 3) for x in clipped.gradients["w"]]
        [0.6, 1.3]

    Reference: Abadi et al. 2016, Algorithm 1.
    """
    validation.positive("l2_clip_norm", l2_clip_norm)
    mode = as_clip_mode(clip_mode)

    def init(params: Params) -> optax.EmptyState:
        group(params)
        return optax.EmptyState()

    def update(
        updates: Any,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        is_padding_example: Any = None,
        clipped_grad: ClippedGrad | None = None,
        **extra: Any,
    ) -> tuple[ClippedGrad, optax.EmptyState]:
        del extra
        if clipped_grad is not None:
            return clipped_grad, state
        if isinstance(updates, ClippedGrad):
            return updates, state
        if geometry is None:
            raise ValueError(
                "clip_per_example got no geometry; use dp_ilg.chain, which supplies "
                "it, or pass geometry=dp_ilg.Geometry.uniform(params) to update."
            )
        if geometry.coordinates is not None:
            geometry.coordinates.check(geometry.groups)
            updates = enter_gradients(geometry.coordinates, updates, geometry.groups)
        per_example = from_gradients(updates, geometry.groups)._replace(params=params)
        mask = opened(updates, is_padding_example)[1]
        clipped = clip_sum(per_example, geometry, l2_clip_norm, mode, mask)
        return clipped, state

    facts = ClipFacts(mode, constant(l2_clip_norm))
    return PrivateTransformation(
        init, update, role="clip", facts=facts, clip_norm=lambda state: l2_clip_norm
    )
