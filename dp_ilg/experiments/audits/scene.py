"""What an audit is made on: a network in the middle of training, and two batches.

The two batches differ in one label, that of the record which moves the gradient most:
ordinary records move its norm by 0.01 % in the median and would show nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_ilg import validation
from dp_ilg.baselines.claims import SETTINGS, PublishedSettings
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.models.linen import Mlp
from dp_ilg.experiments.papers.ilg_runs import Problem, network, principal_components
from dp_ilg.experiments.papers.reproduce import ReproduceOptions

# principal components, hidden units, epochs and learning rate before the attack
_SIZE = (60, 1000, 5, 1e-3)
_SIZES = {"digits": (30, 256, 20, 3e-3)}
_DATA_SETS = ("mnist", "fashion_mnist", "digits")


@dataclass(frozen=True)
class AuditOptions:
    """What an audit may be told.

    Attributes:
        data: mnist, fashion_mnist or digits.
        trials: tested releases with the canary, and as many without; a quarter more of
            each are made to choose the threshold on.
        seed: of network, batch and noise.
        common: data folder, small form, log file.

    Raises:
        ValueError: for another data set, or fewer than 40 trials.

    Example:
        >>> AuditOptions(data="imdb")
        Traceback (most recent call last):
        ValueError: There is no audit on 'imdb'; known are mnist, fashion_mnist, digits.
    """

    data: str = "mnist"
    trials: int = 1000
    seed: int = 0
    common: ReproduceOptions = ReproduceOptions()

    def __post_init__(self):
        validation.whole("trials", self.trials, 40)
        validation.whole("seed", self.seed, 0)
        if self.data not in _DATA_SETS:
            raise ValueError(
                f"There is no audit on {self.data!r}; "
                f"known are {', '.join(_DATA_SETS)}."
            )


@dataclass(frozen=True)
class Scene:
    """One batch and its neighbour, and the network both are shown to.

    Attributes:
        problem: the network and its data.
        params: its weights, trained without privacy for some epochs.
        x: inputs of the batch, ``[B, ...]``.
        labels: of the batch without and with the canary, two ``[B]``.
    """

    problem: Problem
    params: Any
    x: Any
    labels: tuple[Any, Any]


def audit_settings(options: AuditOptions) -> PublishedSettings:
    """The published settings of the data set an audit is on.

    Example:
        >>> audit_settings(AuditOptions(data="digits")).batch_size
        120
    """
    settings = SETTINGS["mnist"]
    if options.data == "digits":
        settings = replace(settings, num_examples=1437, batch_size=120)
    return settings


def make_scene(options: AuditOptions) -> Scene:
    """Trains the network, draws the batch and chooses the canary.

    Args:
        options: data set and seed.

    Returns:
        The scene.

    Raises:
        DataError: for data that is absent.

    Privacy: none; the data must be public.
    """
    settings = audit_settings(options)
    problem = _problem(options)
    params = _trained(problem, settings, options)
    rng = np.random.default_rng(options.seed)
    rows = rng.choice(settings.num_examples, settings.batch_size, replace=False)
    x, y = jnp.asarray(problem.x_train[rows]), problem.y_train[rows]
    canary, label = _canary(problem, params, x, y)
    changed = y.copy()
    changed[canary] = label
    return Scene(problem, params, x, (jnp.asarray(y), jnp.asarray(changed)))


def _problem(options: AuditOptions) -> Problem:
    data = load_dataset(options.data, options.common.data_dir)
    x, x_test = (np.asarray(a).reshape(len(a), -1) for a in (data.x_train, data.x_test))
    pca, hidden = _SIZES.get(options.data, _SIZE)[:2]
    mean, directions = principal_components(x, pca)
    module = Mlp((hidden,), 10, "relu", inputs=pca)
    return Problem(
        **network(module, (pca,)),
        x_train=(x - mean) @ directions.T,
        y_train=data.y_train,
        x_test=(x_test - mean) @ directions.T,
        y_test=data.y_test,
    )


def _trained(
    problem: Problem, settings: PublishedSettings, options: AuditOptions
) -> Any:
    """Weights after ordinary Adam, as the attack starts in the middle of a run."""
    _, _, epochs, rate = _SIZES.get(options.data, _SIZE)
    adam, rng = optax.adam(rate), np.random.default_rng(options.seed)
    params = problem.init(jax.random.key(options.seed))

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(problem.mean_loss)(params, x, y)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, size = adam.init(params), settings.batch_size
    for _ in range(epochs * settings.steps_per_epoch):
        rows = rng.choice(settings.num_examples, size, replace=False)
        batch = problem.x_train[rows], problem.y_train[rows]
        params, state = step(params, state, *batch)
    return params


def _canary(problem: Problem, params: Any, x: Any, y: Any) -> tuple[int, int]:
    """The record of the batch that the network is surest of, and its last guess.

    Changing that label moves the mean gradient most, since all other gradients are
    small by now.
    """
    log_odds = jax.nn.log_softmax(problem.apply(params, x))
    own = np.asarray(log_odds)[np.arange(len(y)), y]
    least = np.asarray(log_odds.argmin(-1))
    record = int(np.argmax(own - np.asarray(log_odds.min(-1))))
    return record, int(least[record])
