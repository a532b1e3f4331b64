"""DP-SGD whose noise is shaped by importance."""

from __future__ import annotations

from typing import Any

import optax

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.plain import descend, heavy_ball
from dp_ilg.optimizers.behind_noise import behind_noise


def dp_sgd_ilg(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    importance: Any = "min_noise_energy",
    source: Any = "scores",
    layers: Any = "module",
    clip_mode: Any = "joint",
    momentum: Any = 0.0,
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
    public_importance: Any = None,
    score: Any = "l2",
) -> PrivateTransformation:
    """DP-SGD with noise shaped by importance: `dp_sgd`, and `dp_adam_ilg`'s geometry.

    Args:
        learning_rate: as in `dp_sgd`.
        plan: from `dp_ilg.plan_privacy`.
        key: PRNG key, secret.
        importance: as in `dp_ilg.dp_adam_ilg`.
        source: as in `dp_ilg.dp_adam_ilg`.
        layers: as in `dp_ilg.dp_adam_ilg`.
        clip_mode: as in `dp_ilg.dp_adam_ilg`.
        momentum: in [0, 1).
        ema_decay: as in `dp_ilg.dp_adam_ilg`.
        floor: as in `dp_ilg.dp_adam_ilg`.
        public_importance: as in `dp_ilg.dp_adam_ilg`.
        score: as in `dp_ilg.dp_adam_ilg`.

    Returns:
        An Optax transformation with ``geometry(state)`` and ``importance(state)``.

    Raises:
        ValueError: for a bad number, rule, source, layering, mode or score.
        TypeError: for a bad key or plan.

    Privacy: (epsilon, delta) of the plan; momentum is post-processing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> prior = dp_ilg.Prior({"w": [1.0, 16.0]}, steps="whitened")
        >>> tx = dp_sgd_ilg(0.1, plan, key=jax.random.key(0), source=prior)
        >>> state = tx.init({"w": jax.numpy.zeros(2)})
        >>> [round(float(b), 2) for b in tx.geometry(state).coordinates.into[0][0]]
        [1.84, 0.92]

    Reference: Abadi et al. 2016, Algorithm 1, in the geometry of docs/idea.md.
    """
    shaped = dict(importance=importance, source=source, layers=layers)
    shaped |= dict(clip_mode=clip_mode, ema_decay=ema_decay, floor=floor)
    shaped |= dict(public_importance=public_importance, score=score)
    links = [*heavy_ball(momentum), descend(learning_rate)]
    return behind_noise(optax.chain(*links), plan, key=key, **shaped)
