"""Adam with moments of at least float32, plain or without the noise known in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import Params, PrivateTransformation, own_promotion
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import accumulator
from dp_ilg.geometry.layers import group
from dp_ilg.noise.add_noise import noise_stddev


def scale_by_wide_adam(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformation:
    """Optax's Adam with moments and updates of float32 where parameters are narrower.

    Optax keeps moments in the parameters' dtype. In bfloat16 a second moment stands
    still: a thousandth of a square is less than its last bit.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.

    Returns:
        A transformation with Optax's ``ScaleByAdamState``; for float32 parameters it is
        ``optax.scale_by_adam``, bit for bit.

    Privacy: post-processing of the releases.

    Example:
        >>> tx = scale_by_wide_adam()
        >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
        >>> str(state.nu["w"].dtype)
        'float32'

    Reference: Kingma and Ba 2015, Algorithm 1.
    """
    inner = optax.scale_by_adam(b1, b2, eps)
    wide = lambda x: x.astype(accumulator(x.dtype))  # noqa: E731

    def init(params: Params) -> Any:
        return inner.init(jax.tree.map(wide, params))

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(jax.tree.map(wide, updates), state, params)

    return optax.GradientTransformation(own_promotion(init), own_promotion(update))


class ScaleByNoiseCorrectedAdamState(NamedTuple):
    """Moments of the releases, and the running variance of their noise.

    Attributes:
        count: steps taken.
        mu: first moment, float32 or wider, shaped like the parameters.
        nu: second moment, the same.
        variance: the same running average, of the known noise variance ``[groups]``.
    """

    count: Any
    mu: Any
    nu: Any
    variance: Any


def scale_by_noise_corrected_adam(
    plan: PrivacyPlan,
    *,
    layers: Any = "module",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    floor: Any = 1e-8,
) -> PrivateTransformation:
    """Adam with the exact noise variance of every layer taken out of the second moment.

    A noisy second moment estimates the signal's plus ``(sigma_t C w_j / B)^2``, which
    drowns it. Here that variance is known exactly for each layer and step, and the
    same running average of it is subtracted: ``m / (sqrt(max(v - phi, floor)) + eps)``.

    Args:
        plan: knows the noise.
        layers: what a layer is, as given to the scorer.
        b1: decay of the first moment.
        b2: decay of the second moment and of the variance.
        eps: added to the root.
        floor: smallest corrected second moment; larger is tamer.

    Returns:
        A transformation for a `dp_ilg.chain`, behind `add_importance_noise`.

    Raises:
        ValueError: for decays outside [0, 1), or a floor that is not positive.

    Privacy: post-processing of the releases.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0),
        ...     adam="noise_corrected")
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, _ = tx.update({"w": jnp.ones((3, 2))}, tx.init(params), params)
        >>> updates["w"].shape
        (2,)

    Reference: Tang et al. 2023 (DP-AdamBC), Algorithm 1, with a variance that may
    differ by layer and step.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        validation.fraction(name, value, include_zero=True)
    validation.positive("floor", floor)

    def init(params: Params) -> ScaleByNoiseCorrectedAdamState:
        zeros = lambda p: jnp.zeros(p.shape, accumulator(p.dtype))  # noqa: E731
        return ScaleByNoiseCorrectedAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
            variance=jnp.zeros(len(group(params, layers).names), jnp.float32),
        )

    def update(
        updates: Params,
        state: ScaleByNoiseCorrectedAdamState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        l2_clip_norm: Any = None,
        **extra: Any,
    ) -> tuple[Params, ScaleByNoiseCorrectedAdamState]:
        del params, extra
        geometry = _checked(geometry, state)
        stddev = noise_stddev(plan, state.count, geometry, l2_clip_norm)
        known = jnp.square(stddev / plan.batch_size)
        state = _averaged(state, updates, known, b1, b2)
        return _direction(state, updates, geometry, (b1, b2, eps, floor)), state

    return PrivateTransformation(init, update, plan=plan)


def _averaged(
    state: ScaleByNoiseCorrectedAdamState,
    updates: Params,
    known: Array,
    b1: Any,
    b2: Any,
) -> ScaleByNoiseCorrectedAdamState:
    """Moves all running averages by one step."""
    blend = lambda old, new, b: jax.tree.map(  # noqa: E731
        lambda o, n: b * o + (1 - b) * n.astype(o.dtype), old, new
    )
    squares = jax.tree.map(
        lambda u: jnp.square(u.astype(accumulator(u.dtype))), updates
    )
    return ScaleByNoiseCorrectedAdamState(
        state.count + 1,
        blend(state.mu, updates, b1),
        blend(state.nu, squares, b2),
        b2 * state.variance + (1 - b2) * known,
    )


def _direction(
    state: ScaleByNoiseCorrectedAdamState,
    updates: Params,
    geometry: Geometry,
    settings: tuple[Any, Any, Any, Any],
) -> Params:
    """Bias-corrected first moment over the root of the corrected second."""
    b1, b2, eps, floor = settings
    count = state.count.astype(jnp.float32)
    noise = geometry.groups.expand(state.variance / (1 - b2**count))
    leaves, treedef = jax.tree.flatten(updates)
    moments = zip(
        leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), noise, strict=True
    )
    out = []
    for leaf, mu, nu, variance in moments:
        second = jnp.maximum(nu / (1 - b2**count) - variance, floor)
        step = mu / (1 - b1**count) / (jnp.sqrt(second) + eps)
        out.append(step.astype(leaf.dtype))
    return jax.tree.unflatten(treedef, out)


def _checked(
    geometry: Geometry | None, state: ScaleByNoiseCorrectedAdamState
) -> Geometry:
    if geometry is None:
        raise ValueError(
            "scale_by_noise_corrected_adam does not know the noise in the release; put "
            "it behind add_importance_noise in a dp_ilg.chain."
        )
    geometry.check_plain("scale_by_noise_corrected_adam")
    geometry.check_whole("scale_by_noise_corrected_adam")
    count = len(geometry.groups.names)
    if state.variance.shape != (count,):
        raise ValueError(
            f"scale_by_noise_corrected_adam was made for {state.variance.shape[0]} "
            f"layers, but the geometry has {count}; give both the same layers=."
        )
    return geometry
