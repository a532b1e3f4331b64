"""DP-AdamILG as its paper prints it. WITHOUT ANY PRIVACY GUARANTEE; for study only.

The published Algorithm 1 sets clip level and noise by the raw gradient, never bounds
what one example does, and does not compose its layers. What it says about epsilon is a
claim, and every name and sentence here says "claimed". `dp_ilg.dp_adam_ilg` is the
private optimizer; ``dp-ilg audit published`` shows the leak of this one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.baselines.claims import (
    SETTINGS,
    PublishedSettings,
    claimed_epochs,
    claimed_epsilon,
    claimed_noise_multipliers,
    claimed_rho,
)
from dp_ilg.noise.add_noise import fresh_key
from dp_ilg.noise.normal import standard_normal

__all__ = [
    "READINGS",
    "SETTINGS",
    "PublishedNoiseWithoutGuaranteeState",
    "PublishedSettings",
    "add_published_noise_without_guarantee",
    "claimed_epochs",
    "claimed_epsilon",
    "claimed_noise_multipliers",
    "claimed_rho",
    "dp_adam_ilg_without_guarantee",
]

_LOG = logging.getLogger(__name__)

# How the noise of the paper's line "N(0, s^2 n sigma^2)" may be meant: what the
# standard deviation s sqrt(n) sigma is divided by, given the batch size.
READINGS: dict[str, Callable[[int], int]] = {
    "printed": lambda batch_size: 1,
    "divided": lambda batch_size: batch_size,
}


class PublishedNoiseWithoutGuaranteeState(NamedTuple):
    """All randomness, and which step comes next; nothing here is private."""

    key: Any
    step: Any


def add_published_noise_without_guarantee(
    settings: PublishedSettings, *, key: Any, reading: str = "printed"
) -> optax.GradientTransformation:
    """Steps 1 to 4 of the published algorithm. It gives NO privacy guarantee.

    Per leaf with n entries: ``s = alpha |g| / sqrt(n)``, every coordinate clipped to
    [-s, s], normal noise of standard deviation ``s sqrt(n) sigma_t``, so the noise
    itself publishes |g|, the norm of the raw gradient.

    Args:
        settings: of the run.
        key: PRNG key; the noise of step t is a function of (key, t) and the leaf.
        reading: "printed", or "divided" with the noise divided by the batch size.

    Returns:
        A transformation from the *ordinary mean gradient of a batch* to the noisy
        one; after the last epoch of the claimed budget it returns zeros.

    Raises:
        ValueError: for an unknown reading.
        TypeError: for a bad key.

    Privacy: none, of any kind, for any input. A log line says so.

    Example:
        >>> tx = add_published_noise_without_guarantee(SETTINGS["mnist"],
        ...     key=jax.random.key(0), reading="divided")
        >>> noisy, state = tx.update({"w": jnp.ones(4)}, tx.init({"w": jnp.ones(4)}))
        >>> noisy["w"].shape, int(state.step)
        ((4,), 1)

    Reference: Li et al. 2024, Algorithm 1 and Eq. 10.
    """
    key = validation.key("key", key)
    if reading not in READINGS:
        raise ValueError(
            f"reading is {reading!r}, but must be one of {sorted(READINGS)}."
        )
    sigmas = claimed_noise_multipliers(settings)
    scales = np.append(sigmas / READINGS[reading](settings.batch_size), 0.0)
    _LOG.warning(
        "DP-AdamILG as published (noise %s) has no privacy guarantee; use "
        "dp_ilg.dp_adam_ilg where data must be protected.",
        reading,
    )

    def init(params: Any) -> PublishedNoiseWithoutGuaranteeState:
        del params
        step = jnp.zeros((), jnp.int32)
        return PublishedNoiseWithoutGuaranteeState(fresh_key(key), step)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        epoch = jnp.minimum(state.step // settings.steps_per_epoch, len(sigmas))
        scale = jnp.asarray(scales, jnp.float32)[epoch]
        goes_on = epoch < len(sigmas)
        leaves, treedef = jax.tree.flatten(updates)
        step_key = jax.random.fold_in(state.key, state.step)
        noisy = [
            _clip_and_noise(leaf, settings.clip_factor, scale, leaf_key)
            for leaf, leaf_key in zip(leaves, _split(step_key, leaves), strict=True)
        ]
        noisy = [jnp.where(goes_on, leaf, 0).astype(leaf.dtype) for leaf in noisy]
        state = PublishedNoiseWithoutGuaranteeState(state.key, state.step + 1)
        return jax.tree.unflatten(treedef, noisy), state

    return optax.GradientTransformation(init, update)


def dp_adam_ilg_without_guarantee(
    learning_rate: Any,
    settings: PublishedSettings,
    *,
    key: Any,
    reading: str = "printed",
) -> optax.GradientTransformation:
    """DP-AdamILG as published, with Adam. It gives NO privacy guarantee.

    Args:
        learning_rate: a number or an Optax schedule; the paper does not give it.
        settings: of the run.
        key: PRNG key.
        reading: "printed", or "divided" with the noise divided by the batch size; the
            first hardly trains, the second comes near the paper's accuracy.

    Returns:
        A transformation whose input is the ordinary mean gradient of a batch. Once the
        claimed budget is used up, updates are zero: training has stopped.

    Raises:
        ValueError: for a bad learning rate or an unknown reading.
        TypeError: for a bad key.

    Privacy: none, of any kind. The claimed epsilon of its paper is wrong; see the
    module. A log line says so whenever one is made.

    Example:
        >>> tx = dp_adam_ilg_without_guarantee(1e-3, SETTINGS["mnist"],
        ...     key=jax.random.key(0), reading="divided")
        >>> params = {"w": jnp.ones(4)}
        >>> updates, state = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
        >>> updates["w"].shape
        (4,)

    Reference: Li, Liang, Jiang, Zhang, "DP-AdamILG", PMLR 260, 2024, Algorithm 1.
    """
    _check_rate(learning_rate)
    noise = add_published_noise_without_guarantee(settings, key=key, reading=reading)
    stop = _zero_after(claimed_epochs(settings) * settings.steps_per_epoch)
    adam = optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(noise, *adam, stop)


def _check_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        validation.rate("learning_rate", learning_rate)


def _zero_after(steps: int) -> optax.GradientTransformation:
    """Adam's momentum would go on when the gradient is zero; the stop rule ends it."""

    def init(params: Any) -> Array:
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        kept = jax.tree.map(
            lambda u: jnp.where(state < steps, u, 0).astype(u.dtype), updates
        )
        return kept, state + 1

    return optax.GradientTransformation(init, update)


def _clip_and_noise(
    gradient: Array, clip_factor: float, scale: Array, key: Array
) -> Array:
    norm = jnp.linalg.norm(gradient.astype(jnp.float32).ravel())
    bound = clip_factor * norm / math.sqrt(max(gradient.size, 1))
    clipped = jnp.clip(gradient.astype(jnp.float32), -bound, bound)
    noise = standard_normal(key, gradient.shape)
    noisy = clipped + clip_factor * norm * scale * noise
    return noisy.astype(gradient.dtype)


def _split(key: Array, leaves: list[Any]) -> list[Array]:
    return [jax.random.fold_in(key, index) for index in range(len(leaves))]
