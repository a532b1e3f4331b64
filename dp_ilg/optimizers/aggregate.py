"""The aggregation step of DP-SGD by itself, for users of ``optax.contrib``."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.clipping.clip import clip_per_example
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.layers import group
from dp_ilg.noise.add_noise import fresh_key, gaussian_noise, released_mean
from dp_ilg.optimizers.wrappers import refuse_wrappers


class DifferentiallyPrivateAggregateState(NamedTuple):
    """All randomness of `differentially_private_aggregate`."""

    key: Any
    step: Any


def differentially_private_aggregate(
    l2_norm_clip: Any, noise_multiplier: Any, key: Any, *, batch_size: int
) -> PrivateTransformation:
    """``optax.contrib.differentially_private_aggregate`` without its faults.

    Same inputs, same distribution, except: the sum is divided by the *expected* batch
    size given here, padding and non-finite examples are absent, an empty batch is a
    noise-only step, norms are exact in half precision, and the key is required.

    Args:
        l2_norm_clip: bound on one example's L2 norm.
        noise_multiplier: ratio of the noise's standard deviation to the bound.
        key: PRNG key, secret.
        batch_size: expected batch size q N.

    Returns:
        A transformation from per-example gradients (or a `ClippedGrad`) to a release.

    Raises:
        ValueError: for a bad norm, multiplier or size.
        TypeError: for a bad key.

    Privacy: one Gaussian with this multiplier a step, for adding or removing one
    example. No plan holds it: nothing here counts steps or knows the sampling. Use
    `dp_adam_ilg` for a guarantee that is tracked.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = differentially_private_aggregate(1.0, 0.0, jax.random.key(0),
        ...     batch_size=2)
        >>> gradients = {"w": jnp.array([[3.0, 4.0], [jnp.nan, 0.0]])}
        >>> release, _ = tx.update(gradients, tx.init({"w": jnp.zeros(2)}))
        >>> [round(float(x), 3) for x in release["w"]]
        [0.3, 0.4]

    Reference: Abadi et al. 2016, Algorithm 1.
    """
    key = validation.key("key", key)
    validation.rate("noise_multiplier", noise_multiplier)
    validation.positive("batch_size", batch_size)
    clip = clip_per_example(l2_norm_clip)

    def init(params: Params) -> DifferentiallyPrivateAggregateState:
        clip.init(params)
        return DifferentiallyPrivateAggregateState(
            fresh_key(key), jnp.zeros((), jnp.int32)
        )

    def update(
        updates: Any,
        state: DifferentiallyPrivateAggregateState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, DifferentiallyPrivateAggregateState]:
        if params is not None:
            refuse_wrappers(updates, group(params), extra.get("clipped_grad"))
        if "geometry" not in extra and not isinstance(updates, ClippedGrad):
            extra["geometry"] = _uniform_for(updates)
        clipped, _ = clip.update(updates, optax.EmptyState(), params, **extra)
        step_key = jax.random.fold_in(state.key, state.step)
        noised = gaussian_noise(clipped, noise_multiplier, step_key)
        release = released_mean(noised, clipped.geometry, batch_size)
        return release, state._replace(step=state.step + 1)

    return PrivateTransformation(init, update, role="private", key=key)


def _uniform_for(gradients: Any) -> Geometry:
    """The ordinary L2 norm for parameters shaped like per-example gradients."""
    group(gradients)
    shapes = jax.tree.map(
        lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients
    )
    return Geometry.uniform(shapes)
