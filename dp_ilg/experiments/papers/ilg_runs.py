"""Training runs of Table 3: the published algorithm, and the same with a guarantee.

Both see the same network, batch size and number of epochs. The published one draws
shuffled batches and ordinary mean gradients, as its paper does, and has no guarantee;
the other draws Poisson batches and clips every example.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.baselines.claims import (
    PublishedSettings,
    claimed_epsilon,
    claimed_noise_multipliers,
)
from dp_ilg.baselines.published import (
    claimed_epochs,
    claimed_rho,
    dp_adam_ilg_without_guarantee,
)
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.step import make_train_step

_EVALUATE_AT_ONCE = 1000


@dataclass(frozen=True)
class Problem:
    """A network and its data, as one run sees them.

    Attributes:
        apply: ``(params, inputs [batch, ...]) -> logits [batch, classes]``.
        init: ``key -> params``.
        x_train: ``[N, ...]`` float32.
        y_train: ``[N]`` int32.
        x_test: inputs for testing.
        y_test: their labels.
    """

    apply: Callable[[Any, Any], Any]
    init: Callable[[Any], Any]
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def loss(self, params: Any, example: Any) -> Any:
        """Cross-entropy of one example."""
        x, y = example
        logits = self.apply(params, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def mean_loss(self, params: Any, x: Any, y: Any) -> Any:
        """Mean cross-entropy of a batch."""
        logits = self.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def network(module: Any, shape: tuple[int, ...]) -> dict[str, Callable]:
    """The functions `Problem` wants of a Flax module.

    Args:
        module: a linen module with parameters only.
        shape: of one input.

    Returns:
        ``apply`` and ``init``.

    Example:
        >>> from dp_ilg.experiments.models.linen import Mlp
        >>> found = network(Mlp((3,), 2, "relu", inputs=4), (4,))
        >>> found["apply"](found["init"](jax.random.key(0)), jnp.ones((5, 4))).shape
        (5, 2)
    """
    zeros = jnp.zeros((1, *shape))
    return {
        "apply": lambda params, x: module.apply({"params": params}, x),
        "init": lambda key: jax.jit(module.init)(key, zeros)["params"],
    }


def principal_components(
    x: np.ndarray, num_components: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary principal components, WITHOUT any privacy; see `private_pca`.

    Args:
        x: one example a row, ``[N, features]``.
        num_components: how many.

    Returns:
        The mean, ``[features]``, and orthonormal rows ``[num_components, features]``.

    Raises:
        ValueError: for more components than features.

    Privacy: none; mean and directions are those of the data.

    Example:
        >>> mean, directions = principal_components(np.array([[0.0, 1], [0, 3]]), 1)
        >>> mean.tolist(), np.abs(directions).tolist()
        ([0.0, 2.0], [[0.0, 1.0]])
    """
    if num_components > x.shape[1]:
        raise ValueError(
            f"num_components is {num_components}, but the data has {x.shape[1]} "
            f"features; choose at most {x.shape[1]}."
        )
    mean = x.mean(0)
    centred = x - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return mean, vectors.T[: -num_components - 1 : -1].astype(x.dtype)


def run_published(
    problem: Problem,
    settings: PublishedSettings,
    *,
    learning_rate: float,
    reading: str,
    seed: int,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Trains with the published algorithm until its claimed budget ends.

    Args:
        problem: the network and its data.
        settings: the paper's inputs.
        learning_rate: of Adam.
        reading: a key of `dp_ilg.published.READINGS`.
        seed: of weights, batches and noise.
        deadline: after the first step, stop at this ``time.monotonic()``; None for no
            limit.

    Returns:
        Test accuracy after each epoch and at the end, steps, seconds, and what the
        paper would claim for them.

    Privacy: none; see `dp_ilg.published`.
    """
    begun = time.monotonic()
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    tx = dp_adam_ilg_without_guarantee(
        learning_rate, settings, key=noise_key, reading=reading
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(problem.mean_loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = problem.init(init_key)
    state, steps, curve = tx.init(params), 0, []
    for rows in _shuffled(settings, seed):
        if steps and _expired(deadline):
            break
        batch = problem.x_train[rows], problem.y_train[rows]
        params, state = step(params, state, *batch)
        steps += 1
        if steps % settings.steps_per_epoch == 0:
            curve.append(accuracy(problem, params))
    begun_epochs = -(-steps // settings.steps_per_epoch)
    return _found(problem, params, steps, curve, begun) | {
        "finished": begun_epochs == claimed_epochs(settings),
        "epochs": round(steps / settings.steps_per_epoch, 2),
        "claimed_epsilon": claimed(settings, begun_epochs),
    }


def run_guaranteed(
    problem: Problem,
    plan: dp_ilg.PrivacyPlan,
    *,
    learning_rate: float,
    end_factor: float = 1.0,
    seed: int,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Trains with `dp_ilg.dp_adam_ilg` for all steps of a plan.

    Args:
        problem: the network and its data.
        plan: sampling, noise and steps.
        learning_rate: of Adam, at the start.
        end_factor: to which part of that it falls, linearly, until the last step.
        seed: of weights, batches and noise.
        deadline: after the first step, stop at this ``time.monotonic()``; None for no
            limit.

    Returns:
        Test accuracy at the end, steps, seconds, and epsilon and delta spent.

    Privacy: the plan's, for adding or removing one training example, if the seed were
        secret and the run the only one. A published seed protects nobody.
    """
    begun = time.monotonic()
    init_key, noise_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    rate = optax.linear_schedule(
        learning_rate, end_factor * learning_rate, plan.num_steps
    )
    tx = dp_ilg.dp_adam_ilg(rate, plan, key=noise_key)
    grad_fn = dp_ilg.clipped_grad(problem.loss, l2_clip_norm=plan.l2_clip_norm)
    step = make_train_step(grad_fn, tx)
    params = problem.init(init_key)
    state, steps = tx.init(params), 0
    for chunks in _poisson(problem, plan, batch_key):
        if steps and _expired(deadline):
            break
        params, state = step(params, state, chunks)
        steps += 1
    return _found(problem, params, steps, [], begun) | {
        "finished": steps == plan.num_steps,
        "epochs": round(steps * plan.batch_size / plan.num_examples, 2),
        "epsilon": plan.epsilon(steps),
        "delta": plan.delta,
        "noise_multiplier": float(plan.noise_multipliers[0]),
        "l2_clip_norm": plan.l2_clip_norm,
        "learning_rate": learning_rate,
        "end_factor": end_factor,
    }


def claimed(settings: PublishedSettings, epochs: int) -> float:
    """The epsilon the paper claims after some epochs; 0 after none.

    Args:
        settings: of the run.
        epochs: begun.

    Returns:
        The claimed epsilon.

    Example:
        >>> from dp_ilg.baselines.published import SETTINGS
        >>> round(claimed(SETTINGS["mnist"], 12), 3)
        2.238
    """
    sigmas = claimed_noise_multipliers(settings)[:epochs]
    return claimed_epsilon(claimed_rho(sigmas), settings.delta) if epochs else 0.0


def accuracy(problem: Problem, params: Any) -> float:
    """Share of test examples whose label gets the highest logit.

    Args:
        problem: the network and its data.
        params: its weights.

    Returns:
        A number in [0, 1].
    """
    right = 0
    for start in range(0, len(problem.y_test), _EVALUATE_AT_ONCE):
        rows = slice(start, start + _EVALUATE_AT_ONCE)
        logits = _jitted(problem.apply)(params, problem.x_test[rows])
        right += int(np.sum(np.argmax(logits, -1) == problem.y_test[rows]))
    return right / len(problem.y_test)


_JITTED: dict[Any, Callable] = {}


def _jitted(apply: Callable) -> Callable:
    return _JITTED.setdefault(apply, jax.jit(apply))


def _shuffled(settings: PublishedSettings, seed: int) -> Iterator[np.ndarray]:
    """Disjoint batches of each epoch, as the paper has them."""
    rng, count = np.random.default_rng(seed), settings.steps_per_epoch
    for _ in range(claimed_epochs(settings)):
        order = rng.permutation(settings.num_examples)[: count * settings.batch_size]
        yield from order.reshape(count, settings.batch_size)


def _poisson(problem: Problem, plan: dp_ilg.PrivacyPlan, key: Any) -> Iterator[list]:
    """The chunks of every step, padded to one size with example 0."""
    spare = 4 * np.sqrt(plan.batch_size * (1 - plan.sampling_prob))
    size = min(plan.num_examples, int(np.ceil(plan.batch_size + spare)))
    sampler = PoissonSampler.for_plan(plan, key=key, chunk_size=size)
    for t in range(plan.num_steps):
        yield [
            ((problem.x_train[c.indices], problem.y_train[c.indices]), padding)
            for c in sampler.chunks(t)
            for padding in [c.is_padding_example]
        ]


def _expired(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _found(
    problem: Problem, params: Any, steps: int, curve: list[float], begun: float
) -> dict[str, Any]:
    found = {
        "test_accuracy": accuracy(problem, params),
        "steps": steps,
        "seconds": round(time.monotonic() - begun, 1),
    }
    return found | ({"accuracy_by_epoch": curve} if curve else {})
