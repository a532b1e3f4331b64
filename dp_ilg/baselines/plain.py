"""Private optimizers that clip in the ordinary norm: DP-SGD, DP-Adam and their kin.

Each is a chain of the verbs; `dp_ilg.baselines` holds them as rows of a table.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.clip import clip_per_example, normalize
from dp_ilg.noise.add_noise import add_importance_noise, fresh_key
from dp_ilg.optimizers.adam import scale_by_noise_corrected_adam, scale_by_wide_adam
from dp_ilg.optimizers.chains import chain
from dp_ilg.optimizers.importance import set_layer_importance


def dp_sgd(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    momentum: Any = 0.0,
) -> PrivateTransformation:
    """DP-SGD: clip, sum, noise, descend; with heavy-ball momentum on the release.

    Args:
        learning_rate: a number or an Optax schedule.
        plan: from `dp_ilg.plan_privacy`, with ``score_budget=0``.
        key: PRNG key, secret.
        layers: which parameters are trained, see `dp_ilg.layers`.
        momentum: in [0, 1).

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.
        TypeError: for a bad key or plan.

    Privacy: (epsilon, delta) of the plan, see `dp_ilg.dp_adam_ilg`; each step is one
    Poisson-subsampled Gaussian and momentum is post-processing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = dp_sgd(0.1, plan, key=jax.random.key(0), momentum=0.9)
        >>> tx.geometry(tx.init({"w": jax.numpy.zeros(2)})).weights.tolist()
        [1.0]

    Reference: Abadi et al. 2016, Algorithm 1.
    """
    return _plain(learning_rate, plan, key, layers, *heavy_ball(momentum))


def dp_sgd_decay(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    momentum: Any = 0.0,
) -> PrivateTransformation:
    """DP-SGD(decay): DP-SGD under a plan whose noise falls over the steps.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: made with a falling schedule, such as ``schedules.inverse_time(k)``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        momentum: as in `dp_sgd`.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a plan whose noise does not fall, and as `dp_sgd`.

    Privacy: (epsilon, delta) of the plan, which accounts every step at its own public
    multiplier. The published one charges an epoch of disjoint batches once; this does
    not rely on that.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> dp_sgd_decay(0.1, plan, key=jax.random.key(0))
        Traceback (most recent call last):
        ValueError: The plan's noise is constant or rises, but dp_sgd_decay needs ...

    Reference: Yu et al. 2019, section IV (dynamic privacy budget allocation).
    """
    steps = np.diff(plan.noise_multipliers)
    if not (np.all(steps <= 0) and np.any(steps < 0)):
        raise ValueError(
            "The plan's noise is constant or rises, but dp_sgd_decay needs a falling "
            "one; make the plan with schedule=dp_ilg.schedules.inverse_time(decay)."
        )
    return dp_sgd(learning_rate, plan, key=key, layers=layers, momentum=momentum)


def dp_adam(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """DP-Adam: Adam on the releases of DP-SGD.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan; Adam is post-processing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = dp_adam(1e-3, plan, key=jax.random.key(0))

    Reference: Kingma and Ba 2015 on the releases of Abadi et al. 2016.
    """
    return _plain(learning_rate, plan, key, layers, scale_by_adam(b1, b2, eps))


def dp_adam_bc(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    floor: Any = 1e-8,
) -> PrivateTransformation:
    """DP-AdamBC: Adam whose second moment is rid of the known noise variance.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        floor: smallest corrected second moment, the method's gamma'; tune it.

    Returns:
        An Optax transformation with ``geometry(state)``.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan; the correction is post-processing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = dp_adam_bc(1e-3, plan, key=jax.random.key(0))

    Reference: Tang et al. 2023, Algorithm 1.
    """
    moments = dict(b1=b1, b2=b2, eps=eps, floor=floor, layers=layers)
    adam = scale_by_noise_corrected_adam(plan, **moments)
    return _plain(learning_rate, plan, key, layers, adam)


def automatic_clipping(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    gamma: Any = 0.01,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """Automatic clipping (AUTO-S): every example is scaled to nearly C; then Adam.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: with ``score_budget=0``.
        key: PRNG key, secret.
        layers: as in `dp_sgd`.
        gamma: an example g becomes ``C g / (|g| + gamma)``.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``, which tells
        `dp_ilg.clipped_grad` the clip mode.

    Raises:
        ValueError: for a bad number or layering.

    Privacy: (epsilon, delta) of the plan; a scaled example is shorter than C.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> tx = automatic_clipping(1e-3, plan, key=jax.random.key(0))

    Reference: Bu et al. 2022 (AUTO-S), whose gamma this is.
    """
    mode = normalize(gamma)
    adam = scale_by_adam(b1, b2, eps)
    return chain(
        clip_per_example(plan.l2_clip_norm, clip_mode=mode),
        set_layer_importance("uniform", None, layers=layers),
        add_importance_noise(plan, key=keys(key)[1], layers=layers),
        adam,
        descend(learning_rate),
    )


def keys(key: Any) -> Any:
    """Two keys out of the one an optimizer is given: for counts, and for noise.

    They are those of `dp_ilg.dp_adam_ilg`, so that equal methods make equal releases.

    Raises:
        TypeError: unless `key` is a PRNG key.

    Example:
        >>> keys(jax.random.key(0)).shape
        (2,)
    """
    return jax.random.split(fresh_key(validation.key("key", key)))


def scale_by_adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    """Optax's Adam with moments of at least float32, its numbers checked.

    Raises:
        ValueError: for decays outside [0, 1) or an epsilon that is not positive.
    """
    validation.fraction("b1", b1, include_zero=True)
    validation.fraction("b2", b2, include_zero=True)
    validation.positive("eps", eps)
    return scale_by_wide_adam(b1, b2, eps)


def heavy_ball(momentum: Any) -> tuple[optax.GradientTransformation, ...]:
    """Momentum on the releases, or nothing for 0 (of an array: a momentum of 0).

    Raises:
        ValueError: for a momentum outside [0, 1).
    """
    validation.fraction("momentum", momentum, include_zero=True)
    is_array = isinstance(momentum, jax.Array)  # of optax.inject_hyperparams, say
    return (optax.trace(momentum),) if is_array or momentum else ()


def descend(learning_rate: Any) -> optax.GradientTransformation:
    """Minus the learning rate, a checked number or a schedule.

    Raises:
        ValueError: for a negative number.
    """
    rate: Any = learning_rate
    if not callable(learning_rate):
        validation.rate("learning_rate", learning_rate)
    return optax.scale_by_learning_rate(rate)


def _plain(
    learning_rate: Any,
    plan: PrivacyPlan,
    key: Any,
    layers: Any,
    *tail: optax.GradientTransformation,
) -> PrivateTransformation:
    """Clips and noises in the ordinary norm, then does `tail`."""
    return chain(
        clip_per_example(plan.l2_clip_norm),
        set_layer_importance("uniform", None, layers=layers),
        add_importance_noise(plan, key=keys(key)[1], layers=layers),
        *tail,
        descend(learning_rate),
    )
