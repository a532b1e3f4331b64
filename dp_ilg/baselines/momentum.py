"""Gradient descent on a release whose noise follows importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.plain import descend, heavy_ball
from dp_ilg.clipping.adding.metric_sums import Metric
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
    noise: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    score: Any = "l2",
) -> PrivateTransformation:
    """DP-SGD with momentum, its noise shaped by layer importance.

    A linear model gains nothing from Adam: what Adam divides by is mostly noise.

    Args:
        learning_rate: a number or an Optax schedule.
        plan: from `plan_privacy`.
        key: PRNG key, secret.
        importance: as in `dp_ilg.dp_adam_ilg`; "uniform" is DP-SGD.
        source: as in `dp_ilg.dp_adam_ilg`.
        layers: as in `dp_ilg.dp_adam_ilg`.
        clip_mode: as in `dp_ilg.dp_adam_ilg`.
        momentum: in [0, 1).
        ema_decay: as in `dp_ilg.dp_adam_ilg`.
        floor: as in `dp_ilg.dp_adam_ilg`.
        public_importance: as in `dp_ilg.dp_adam_ilg`.
        noise: as in `dp_ilg.dp_adam_ilg`.
        metrics: as in `dp_ilg.dp_adam_ilg`.
        score: as in `dp_ilg.dp_adam_ilg`.

    Returns:
        An Optax transformation with ``geometry(state)`` and ``importance(state)``.

    Raises:
        ValueError: for a bad number, rule, source, layering, mode or score.
        TypeError: for a bad key or plan.

    Privacy: (epsilon, delta) of the plan, under its neighbouring relation, as
    `dp_ilg.dp_adam_ilg`; momentum is post-processing.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100)
        >>> tx = dp_sgd_ilg(0.1, plan, key=jax.random.key(0), momentum=0.9)
        >>> tx.geometry(tx.init({"w": jax.numpy.zeros(2)})).weights.tolist()
        [1.0]

    Reference: Abadi et al. 2016, Algorithm 1, in the geometry of docs/idea.md.
    """
    behind = optax.chain(*heavy_ball(momentum), descend(learning_rate))
    shaped = dict(importance=importance, source=source, layers=layers, score=score)
    shaped |= dict(clip_mode=clip_mode, ema_decay=ema_decay, floor=floor, noise=noise)
    shaped |= dict(public_importance=public_importance, metrics=metrics)
    return behind_noise(behind, plan, key=key, **shaped)
