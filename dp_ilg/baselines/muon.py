"""Muon behind the noise: steps of orthogonalised momentum, from releases alone."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import Params, PrivateTransformation, own_promotion
from dp_ilg.baselines.plain import descend, keys
from dp_ilg.clipping.clip import clip_per_example
from dp_ilg.geometry.groups import accumulator
from dp_ilg.noise.add_noise import add_importance_noise
from dp_ilg.optimizers.chains import chain
from dp_ilg.optimizers.importance import set_layer_importance


def dp_muon(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    layers: Any = "module",
    momentum: Any = 0.95,
    adam_factor: Any = 0.1,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> PrivateTransformation:
    """Muon on the releases: kernels step by orthogonalised momentum, the rest by Adam.

    Orthogonalising makes all singular values of a step alike, those of noise among
    them; so it wants large batches, 2,048 and more. Kernels of convolutions count as
    matrices of inputs by outputs.

    Args:
        learning_rate: of the kernels: a number or an Optax schedule.
        plan: as in `dp_ilg.baselines.plain.dp_sgd`.
        key: PRNG key, secret.
        layers: as in `dp_ilg.baselines.plain.dp_sgd`.
        momentum: Muon's beta, in [0, 1).
        adam_factor: Adam's rate for biases and the like, over the learning rate.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's and Muon's epsilon.

    Returns:
        An Optax transformation with ``geometry(state)``; momentum is of float32 at
        least.

    Raises:
        ValueError: for a bad number or layering.
        TypeError: for a bad key or plan.

    Privacy: (epsilon, delta) of the plan, see `dp_ilg.dp_adam_ilg`; all that Muon does
    is post-processing of the releases.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=10_000, batch_size=2048, score_budget=0)
        >>> tx = dp_muon(0.02, plan, key=jax.random.key(0))
        >>> tx.geometry(tx.init({"w": jax.numpy.zeros((2, 3))})).weights.tolist()
        [1.0]

    Reference: Jordan et al. 2024 (Muon), as ``optax.contrib.muon`` has it.
    """
    for name, value in dict(momentum=momentum, b1=b1, b2=b2).items():
        validation.fraction(name, value, include_zero=True)
    validation.positive("adam_factor", adam_factor)
    validation.positive("eps", eps)
    return chain(
        clip_per_example(plan.l2_clip_norm),
        set_layer_importance("uniform", None, layers=layers),
        add_importance_noise(plan, key=keys(key)[1], layers=layers),
        _wide_muon(momentum, adam_factor, b1, b2, eps),
        descend(learning_rate),
    )


def _wide_muon(
    momentum: Any, adam_factor: Any, b1: Any, b2: Any, eps: Any
) -> optax.GradientTransformation:
    """Optax's Muon, without a rate of its own, in float32 or wider."""
    inner = contrib.muon(
        -1.0,  # `descend` has the rate and the sign
        beta=momentum,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=-adam_factor,
        muon_weight_dimension_numbers=_matrices,
    )
    wide = lambda x: x.astype(accumulator(x.dtype))  # noqa: E731

    def init(params: Params) -> Any:
        return inner.init(jax.tree.map(wide, params))

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        params = None if params is None else jax.tree.map(wide, params)
        return inner.update(jax.tree.map(wide, updates), state, params)

    return optax.GradientTransformation(own_promotion(init), own_promotion(update))


def _matrices(params: Params) -> Any:
    """Which leaves are matrices to Muon, and along which axes; None for the others."""

    def facts(leaf: Any) -> Any:
        last = len(leaf.shape) - 1
        if last < 1:
            return None
        return contrib.MuonDimensionNumbers(tuple(range(last)), last)

    return jax.tree.map(facts, params)
