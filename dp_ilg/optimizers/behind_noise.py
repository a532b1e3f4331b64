"""Any Optax transformation behind the noise: the private chain around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.clipping.clip import as_clip_mode, clip_per_example
from dp_ilg.geometry.layers import as_layering
from dp_ilg.geometry.rules import as_rule
from dp_ilg.noise.add_noise import add_importance_noise, fresh_key
from dp_ilg.optimizers.chains import chain
from dp_ilg.optimizers.metric_links import metric_links
from dp_ilg.optimizers.sources import release_links, steps_of


def behind_noise(
    optimizer: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    importance: Any = "min_noise_energy",
    source: Any = "scores",
    layers: Any = "module",
    clip_mode: Any = "joint",
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
    public_importance: Any = None,
    noise: str | None = None,
    score: Any = "l2",
    metrics: Mapping[str, Metric] | None = None,
) -> PrivateTransformation:
    """Puts an Optax transformation behind clip, importance and noise.

    Args:
        optimizer: any Optax transformation that needs gradients and parameters alone.
        plan: from `plan_privacy`.
        key: PRNG key, secret; scores and noise use different keys made from it.
        importance: as in `dp_adam_ilg`.
        source: as in `dp_adam_ilg`.
        layers: as in `dp_adam_ilg`.
        clip_mode: as in `dp_adam_ilg`.
        ema_decay: as in `dp_adam_ilg`.
        floor: as in `dp_adam_ilg`.
        public_importance: as in `dp_adam_ilg`.
        noise: as in `dp_adam_ilg`.
        score: as in `dp_adam_ilg`.
        metrics: as in `dp_adam_ilg`.

    Returns:
        An Optax transformation with ``geometry(state)`` and ``importance(state)``.

    Raises:
        ValueError: for a bad rule, source, layering, mode or score.
        TypeError: for a bad key or plan.

    Privacy: as `dp_adam_ilg`; the optimizer sees nothing but what was released.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, optax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = behind_noise(optax.lion(1e-3), plan, key=jax.random.key(0))
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.ones((4, 2))}, tx.init(params), params)
        >>> updates["w"].shape
        (2,)

    Reference: the step in docs/idea.md.
    """
    key, layers = validation.key("key", key), as_layering(layers)
    score_key, noise_key = jax.random.split(fresh_key(key))
    stage = add_importance_noise(plan, key=noise_key, noise=noise, layers=layers)
    scored = dict(layers=layers, ema_decay=ema_decay, floor=floor, score=score)
    release = release_links(
        source, as_rule(importance), score_key, stage, public_importance, **scored
    )
    mode = as_clip_mode(clip_mode)
    return chain(
        clip_per_example(plan.l2_clip_norm, clip_mode=mode),
        *metric_links(plan, metrics, key),
        *release,
        *steps_of(source, optimizer),
    )
