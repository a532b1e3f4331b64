"""Private optimizers whose clip adapts: per entry, or by a quantile of the norms.

Each is a chain of the verbs; `dp_ilg.baselines` holds them as rows of a table.
"""

from __future__ import annotations

from typing import Any

import optax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.plain import descend, heavy_ball, keys, scale_by_adam
from dp_ilg.baselines.quantile import adapt_clip_norm
from dp_ilg.baselines.scaling import scale_coordinates
from dp_ilg.clipping.clip import clip_per_example
from dp_ilg.noise.add_noise import add_importance_noise
from dp_ilg.optimizers.chains import chain


def adadp(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    decay: Any = 0.9,
    eps: Any = 1e-8,
    floor: Any = 1e-6,
) -> PrivateTransformation:
    """ADADP made private: RMSprop, with noise in proportion to each entry's size.

    Entry k has the sensitivity ``s_k``, in proportion to ``sqrt(E[g_k^2] + floor^2)``
    with E from past *noisy* gradients, and noise ``sigma_k`` in proportion to s_k with
    ``sum_k s_k^2 / sigma_k^2 = 1 / sigma^2``. Examples are clipped to the ellipsoid
    ``sum_k (g_k / s_k)^2 <= n`` (n entries), which holds the published box
    ``|g_k| <= s_k`` and has the same noise. The s_k are scaled so that C is still the
    L2 bound of an example of that profile.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        decay: of the average of squares, both for s_k and for RMSprop.
        eps: RMSprop's epsilon.
        floor: smallest size of an entry.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan. The published algorithm has none where E is
    of raw gradients or the batch's mean is clipped in place of examples.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = adadp(1e-3, plan, key=jax.random.key(0))

    Reference: Xu et al. 2020 (ADADP).
    """
    scale = scale_coordinates("adadp", plan, layers=layers, decay=decay, floor=floor)
    validation.positive("eps", eps)
    return _scaled(
        learning_rate, plan, key, layers, scale, optax.scale_by_rms(decay, eps)
    )


def adaclip(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    mean_decay: Any = 0.99,
    decay: Any = 0.9,
    floor: Any = 1e-6,
    momentum: Any = 0.0,
) -> PrivateTransformation:
    """AdaCliP: SGD with each entry centred and scaled by past releases.

    The centre is their running mean; the scale of an entry is the root of its standard
    deviation s_k around it (known noise taken out), times a factor such that
    ``sum_k (s_k / b_k)^2 = sum_k s_k^2``: then C is the L2 bound of a centred example
    of that profile. The published factor gives 1, for C = 1.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        mean_decay: of the running mean.
        decay: of the running variance.
        floor: smallest standard deviation of an entry.
        momentum: as in `dp_sgd`.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan. An absent example adds exactly 0, so one
    that is present moves the centred sum by at most C; the centre is put back in
    whole, whatever was drawn (see `dp_ilg.geometry.coordinates`).

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = adaclip(0.1, plan, key=jax.random.key(0))

    Reference: Pichapati et al. 2019, Algorithm 1 and Theorem 2.
    """
    own: Any = dict(mean_decay=mean_decay, decay=decay, floor=floor, layers=layers)
    scale = scale_coordinates("adaclip", plan, **own)
    return _scaled(learning_rate, plan, key, layers, scale, *heavy_ball(momentum))


def scale_then_privatize(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    scale_eps: Any = 1e-3,
) -> PrivateTransformation:
    """Scale-then-privatize: clip and noise in Adam's scale of each entry, then Adam.

    Per-example gradients are divided by ``sqrt(v) + scale_eps``, v being the running
    second moment of the releases so far (0 before the first), clipped to C **in that
    scale**, noised and multiplied back.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``; its C is in units of the scaled gradient.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment and of v.
        eps: Adam's epsilon.
        scale_eps: added to the root before scaling; tune it.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan; v comes from past releases.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = scale_then_privatize(1e-3, plan, key=jax.random.key(0))

    Reference: Ganesh et al. 2025 (scale-then-privatize).
    """
    own: Any = dict(decay=b2, floor=scale_eps, layers=layers)
    scale = scale_coordinates("scale_then_privatize", plan, **own)
    return _scaled(learning_rate, plan, key, layers, scale, scale_by_adam(b1, b2, eps))


def quantile_clipping(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    quantile: Any = 0.5,
    step_size: Any = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """Quantile clipping: the clip norm follows a quantile of the norms; then Adam.

    See `dp_ilg.baselines.quantile.adapt_clip_norm`.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with a score budget, which the counts spend; its C is where the
            threshold starts.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        quantile: which share of the examples is not to be clipped.
        step_size: how fast thresholds move, on the log scale.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a plan without score budget, a bad number or layering.

    Privacy: (epsilon, delta) of the plan, which accounts counts and gradient of a step
    as the one Gaussian on the same Poisson sample that they are.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0.01)
        >>> tx = quantile_clipping(1e-3, plan, key=jax.random.key(0))

    Reference: Andrew et al. 2021, Algorithm 1.
    """
    adapt: Any = dict(layers=layers, quantile=quantile, step_size=step_size)
    adam = scale_by_adam(b1, b2, eps)
    return _counted(learning_rate, plan, key, adapt, adam)


def quantile_clipping_per_layer(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    quantile: Any = 0.5,
    step_size: Any = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """Quantile clipping with a threshold for every layer; then Adam.

    Noise in a layer is in proportion to its threshold, see
    `dp_ilg.baselines.quantile.adapt_clip_norm`.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with a score budget, which the counts spend; its C is where the
            threshold starts (divided by the root of the number of layers).
        key: PRNG key, secret.
        layers: as in `dp_sgd`; each group has a threshold.
        quantile: which share of the groups is not to be clipped.
        step_size: how fast thresholds move, on the log scale.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``, which tells
        `dp_ilg.clipped_grad` the clip mode, "per_layer".

    Raises:
        ValueError: for a plan without score budget, a bad number or layering.

    Privacy: (epsilon, delta) of the plan, which accounts counts and gradient of a step
    as the one Gaussian on the same Poisson sample that they are.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0.01)
        >>> tx = quantile_clipping_per_layer(1e-3, plan, key=jax.random.key(0))

    Reference: He et al. 2023 (group-wise clipping, "equal budget").
    """
    adapt: Any = dict(layers=layers, quantile=quantile, step_size=step_size)
    adam = scale_by_adam(b1, b2, eps)
    return _counted(learning_rate, plan, key, adapt, adam, "per_layer")


def _scaled(
    learning_rate: Any,
    plan: PrivacyPlan,
    key: Any,
    layers: Any,
    scale: PrivateTransformation,
    *tail: optax.GradientTransformation,
) -> PrivateTransformation:
    """Clips and noises in the coordinates that `scale` keeps, then does `tail`."""
    return chain(
        clip_per_example(plan.l2_clip_norm),
        add_importance_noise(plan, key=keys(key)[1], layers=layers),
        scale,
        *tail,
        descend(learning_rate),
    )


def _counted(
    learning_rate: Any,
    plan: PrivacyPlan,
    key: Any,
    adapt: dict[str, Any],
    tail: optax.GradientTransformation,
    clip_mode: str = "joint",
) -> PrivateTransformation:
    """Clips at thresholds that noised counts move, then does `tail`."""
    count_key, noise_key = keys(key)
    own = dict(adapt, each_group=clip_mode == "per_layer")
    return chain(
        clip_per_example(plan.l2_clip_norm, clip_mode=clip_mode),
        adapt_clip_norm(plan, key=count_key, **own),
        add_importance_noise(plan, key=noise_key, layers=adapt["layers"]),
        tail,
        descend(learning_rate),
    )
