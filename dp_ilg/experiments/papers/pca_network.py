"""One run of the network of Abadi et al. (2016): DP-PCA, one hidden layer, DP-SGD.

One plan holds the PCA and all steps, so that its epsilon is that of the whole run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.projection.pca import PrivatePca, pca_releases, private_pca

DELTA = 1e-5
LOT = 600
FEATURE_NORM = 4.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the reproduction; everything in it is public.

    Attributes:
        epsilon: of PCA and training together, at delta 1e-5.
        reported: the paper's test accuracy in percent.
        epochs: of training; an epoch is as many lots as examples / 600.
        learning_rate: at the start; it falls linearly to a hundredth.
        l2_clip_norm: the bound of one example's gradient.
        pca_noise_multiplier: the noise of the PCA.
        momentum: of SGD; 0 for none.
        whiten: coordinates are divided by this power of their noised variance's root.
        dims: how many principal directions.
        hidden: how many rectified units.
    """

    epsilon: float
    reported: float
    epochs: int
    learning_rate: float
    l2_clip_norm: float = 1.0
    pca_noise_multiplier: float = 16.0
    momentum: float = 0.0
    whiten: float = 0.5
    dims: int = 60
    hidden: int = 1000


class Images(NamedTuple):
    """Flat images in [0, 1] and labels, to train on and to test on."""

    x_train: Any
    y_train: Any
    x_test: Any
    y_test: Any


def run(
    setting: Setting, images: Images, seed: int, deadline: float = math.inf
) -> dict[str, Any]:
    """One private run, from pixels to test accuracy.

    Args:
        setting: what to do.
        images: on what; the training part is what the guarantee protects.
        seed: of every key in the run.
        deadline: when to give up, by ``time.monotonic()``.

    Returns:
        Test accuracy, epsilon, multipliers and seconds, ready for JSON.

    Raises:
        ValueError: for a budget too small for the PCA and one step, or more directions
            than pixels.
        TimeoutError: at the deadline.
    """
    start = time.monotonic()
    plan = plan_for(setting, len(images.y_train))
    keys = jax.random.split(jax.random.key(seed), 4)
    pca = private_pca(
        images.x_train,
        setting.dims,
        noise_multiplier=setting.pca_noise_multiplier,
        key=keys[0],
    )
    train, test = (features(setting, pca, x) for x in (images.x_train, images.x_test))
    labelled = train, jnp.asarray(images.y_train)
    params = train_network(setting, plan, labelled, keys[1:], deadline)
    predicted = logits(params, test).argmax(-1)
    return {
        "test_accuracy": float(np.mean(np.asarray(predicted) == images.y_test)),
        "epsilon": plan.epsilon(),
        "epsilon_of_pca": plan.epsilon(0),
        "delta": plan.delta,
        "steps": plan.num_steps,
        "noise_multiplier": float(plan.noise_multipliers[0]),
        "seconds": round(time.monotonic() - start, 1),
        "plan_digest": plan.digest(),
    }


def plan_for(setting: Setting, num_examples: int) -> dp_ilg.PrivacyPlan:
    """The plan of PCA and training together.

    Args:
        setting: what to do.
        num_examples: how many training examples there are.

    Returns:
        The plan, whose epsilon is the setting's.

    Raises:
        ValueError: if the PCA alone costs more than that.

    Example:
        >>> plan = plan_for(Setting(2.0, 95.0, epochs=1, learning_rate=1.0), 60_000)
        >>> plan.num_steps, plan.prior_releases
        (100, (('DP-PCA', 16.0),))
        >>> 1.99 < plan.epsilon() <= 2.0
        True
    """
    lot = min(LOT, num_examples)
    return dp_ilg.plan_privacy(
        epsilon=setting.epsilon,
        delta=DELTA,
        num_examples=num_examples,
        batch_size=lot,
        num_steps=max(1, setting.epochs * num_examples // lot),
        score_budget=0.0,
        l2_clip_norm=setting.l2_clip_norm,
        prior_releases=pca_releases(setting.pca_noise_multiplier),
    )


def features(setting: Setting, pca: PrivatePca, x: Any) -> jax.Array:
    """Coordinates along the directions: centred, partly whitened, of one norm.

    The strongest direction of images, none of which has negative pixels, is about that
    of their mean, whose length is the root of its eigenvalue: subtracting that centres
    them. Directions and eigenvalues are released by the PCA, and scaling an image by
    its own norm needs nothing of the others, so none of it costs anything more.

    Example:
        >>> pca = private_pca(np.eye(3), 2, noise_multiplier=1.0, key=jax.random.key(0))
        >>> found = features(Setting(2.0, 95.0, 1, 1.0), pca, np.eye(3))
        >>> found.shape, float(jnp.linalg.norm(found[0]).round(3))
        ((3, 2), 4.0)
    """
    found = pca.project(_scaled(jnp.asarray(x, jnp.float32), 1.0))
    variances = jnp.maximum(pca.eigenvalues, 1e-4)
    upwards = jnp.where(jnp.sum(pca.components[0]) < 0, -1, 1)
    found = found.at[:, 0].add(-upwards * jnp.sqrt(variances[0]))
    variances = variances.at[0].set(variances[min(1, len(variances) - 1)])
    return _scaled(found / variances ** (setting.whiten / 2), FEATURE_NORM)


def _scaled(rows: jax.Array, norm: float) -> jax.Array:
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return norm * rows / jnp.maximum(norms, 1e-6)


def initial(key: Any, dims: int, hidden: int) -> dict[str, Any]:
    """Weights of the network before training: He's, and a last layer of zeros."""
    kernel = jnp.sqrt(2 / dims) * jax.random.normal(key, (dims, hidden))
    return {
        "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "output": {"kernel": jnp.zeros((hidden, 10)), "bias": jnp.zeros(10)},
    }


def logits(params: Any, x: Any) -> Any:
    """The network: one layer of rectified units, then ten scores.

    The units' mean over random weights, a constant, is taken off them: a gradient is
    the units times the errors, and what all images share would use up its norm.
    """
    first, last = params["hidden"], params["output"]
    mean = FEATURE_NORM * np.sqrt(2 / x.shape[-1]) / np.sqrt(2 * np.pi)
    hidden = jax.nn.relu(x @ first["kernel"] + first["bias"]) - mean
    return hidden @ last["kernel"] + last["bias"]


def loss_fn(params: Any, example: Any) -> Any:
    """Cross-entropy of one example."""
    x, y = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def dp_sgd(setting: Setting, plan: dp_ilg.PrivacyPlan, key: Any) -> Any:
    """Plain DP-SGD, its learning rate falling linearly to a hundredth."""
    rate = optax.linear_schedule(
        setting.learning_rate, setting.learning_rate / 100, plan.num_steps
    )
    return dp_ilg.chain(
        dp_ilg.clip_per_example(plan.l2_clip_norm),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(plan, key=key),
        optax.sgd(rate, momentum=setting.momentum or None),
    )


def train_network(
    setting: Setting,
    plan: dp_ilg.PrivacyPlan,
    train: Any,
    keys: Any,
    deadline: float = math.inf,
) -> Any:
    """All steps of the plan, compiled in pieces of a hundred.

    Args:
        setting: what to do.
        plan: sampling, noise and number of steps.
        train: features and labels of the training examples.
        keys: for the weights, the noise and the batches.
        deadline: when to give up, by ``time.monotonic()``.

    Returns:
        The trained weights.

    Raises:
        TimeoutError: at the deadline.
    """
    params = initial(keys[0], train[0].shape[1], setting.hidden)
    tx = dp_sgd(setting, plan, keys[1])
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=keys[2])
    several = jax.jit(_steps(plan, tx))
    carry = params, tx.init(params)
    for start in range(0, plan.num_steps, 100):
        if time.monotonic() > deadline:
            raise TimeoutError
        lots = range(start, min(start + 100, plan.num_steps))
        carry = several(carry, indices(sampler, lots), train)
    return carry[0]


def _steps(plan: dp_ilg.PrivacyPlan, tx: Any) -> Any:
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)

    def several(carry: Any, lots: Any, train: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            clipped = grad_fn(
                params,
                jax.tree.map(lambda a: a[rows], train),
                geometry=tx.geometry(state),
                is_padding_example=rows < 0,
            )
            updates, state = tx.update(clipped, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, lots)[0]

    return several


def indices(sampler: Any, steps: range) -> np.ndarray:
    """Which examples take part in some steps; -1 fills up.

    A draw larger than a chunk takes two, and then every step of the piece is given that
    room: no draw is cut.

    Example:
        >>> sampler = dp_ilg.PoissonSampler(4, 1.0, key=0, chunk_size=3)
        >>> indices(sampler, range(1)).tolist()
        [[0, 1, 2, 3, -1, -1]]
    """
    drawn = [np.concatenate([c.indices for c in sampler.chunks(t)]) for t in steps]
    longest = max(len(rows) for rows in drawn)
    filled = [np.pad(r, (0, longest - len(r)), constant_values=-1) for r in drawn]
    return np.stack(filled).astype(np.int32)
