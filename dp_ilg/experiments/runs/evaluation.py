"""What is computed of parameters: accuracy or error, perplexity, loss, digest."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.experiments.runs.job import Job
from dp_ilg.sampling.gather import take

_EVAL_ROWS = 1000


def answer_fn(job: Job) -> Callable[[Any], float]:
    """Compiles what a run's model is measured by on its test examples.

    Args:
        job: the run.

    Returns:
        parameters -> share of test examples that are right, or the mean squared error
        of numbers; which of them is ``job.data.measure``.

    Privacy:
        Reads the test set only, which the guarantee does not cover.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> job = build_job(Config())
        >>> 0 <= answer_fn(job)(job.model.init(jax.random.key(0))) <= 1
        True
    """
    predict = jax.jit(job.model.predict)
    batches = list(_batches(job.data.x_test, len(job.data.y_test)))
    told = np.asarray(job.data.y_test)
    compare = _COMPARED[job.data.measure.name]

    def answer(params: Any) -> float:
        found = np.concatenate([np.asarray(predict(params, xs)) for xs in batches])
        return float(np.mean(compare(found[: len(told)], told)))

    return answer


def answered(job: Job, value: float) -> dict[str, float]:
    """What a model reached, as ``metrics.jsonl`` and ``summary.json`` hold it.

    Args:
        job: the run.
        value: of `answer_fn`.

    Returns:
        The measure by its key; beside a mean squared error its root.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> answered(build_job(Config()), 0.5)
        {'test_accuracy': 0.5}
    """
    measure = job.data.measure
    found = {measure.key: value}
    return found | ({"test_rmse": value**0.5} if measure.name == "mse" else {})


def _squared(found: np.ndarray, told: np.ndarray) -> np.ndarray:
    return np.square(found.astype(np.float64) - told)


_COMPARED = {"accuracy": np.equal, "mse": _squared}  # by the name of a measure


def perplexity_fn(job: Job) -> Callable[[Any], float] | None:
    """Compiles the test perplexity of a model of texts to continue.

    Args:
        job: the run.

    Returns:
        parameters -> exponential of the mean loss over all test tokens, which a guess
        at random makes the size of the vocabulary; None where examples have one label.

    Privacy:
        As for `answer_fn`: it reads the test set only.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> perplexity_fn(build_job(Config())) is None
        True
    """
    if job.data.y_test.ndim == 1:
        return None
    count = len(job.data.y_test)
    batches = list(_batches((job.data.x_test, job.data.y_test), count))
    losses = jax.jit(jax.vmap(job.model.loss_fn, (None, 0)))

    def perplexity(params: Any) -> float:
        found = np.concatenate([np.asarray(losses(params, b)) for b in batches])
        return float(np.exp(np.mean(found[:count])))

    return perplexity


def unprotected_loss_fn(job: Job) -> Callable[[Any], float]:
    """Compiles the mean loss of up to 1,000 training examples: NOT protected.

    Args:
        job: the run.

    Returns:
        parameters -> the loss.

    Privacy:
        None: it reads training examples and adds no noise. What is protected is
        ``released`` in the records of a run with metrics.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> job = build_job(Config())
        >>> unprotected_loss_fn(job)(job.model.init(jax.random.key(0))) > 0
        True
    """
    rows = np.arange(min(_EVAL_ROWS, len(job.data.y_train)))
    batch = take((job.data.x_train, job.data.y_train), rows)
    losses = jax.jit(jax.vmap(job.model.loss_fn, (None, 0)))
    return lambda params: float(jnp.mean(losses(params, batch)))


def params_sha256(params: Any) -> str:
    """A digest of parameters: equal exactly if names, types and all bits are.

    Args:
        params: any tree of arrays.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one, other = {"w": jnp.zeros(2)}, {"w": jnp.zeros(2).at[0].set(-0.0)}
        >>> params_sha256(one) == params_sha256(other)
        False
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return leaves_sha256((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)


def leaves_sha256(leaves: Iterable[tuple[str, Any]]) -> str:
    """`params_sha256` of parameters that are not in their tree.

    Args:
        leaves: pairs of a place, as JAX prints it, and an array, in the tree's order.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> w = jnp.zeros(2)
        >>> leaves_sha256([("['w']", w)]) == params_sha256({"w": w})
        True
    """
    digest = hashlib.sha256()
    for place, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{place} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _batches(source: Any, length: int) -> Iterator[Any]:
    """Cuts rows into batches of one size; the last is filled with zeros."""
    size = min(_EVAL_ROWS, length)
    for begin in range(0, length, size):
        rows = np.arange(begin, begin + size)
        yield take(source, np.where(rows < length, rows, -1))
