"""What is computed of parameters, accuracy and such; what a finished run says."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.baselines.made_of import parts_of
from dp_ilg.experiments.models.networks import MODELS
from dp_ilg.experiments.reports.origin import file_sha256, now, versions
from dp_ilg.experiments.runs.job import Job
from dp_ilg.experiments.runs.measures import in_words, told
from dp_ilg.experiments.runs.recipe import source_of_importance
from dp_ilg.sampling.gather import take

_EVAL_ROWS = 1000
_FIXED_SEED = (
    "The seed was fixed: the run can be repeated, and its guarantee holds only against "
    "those who do not know the seed."
)
_FRESH_KEYS = (
    "The keys came from the operating system and are in the checkpoints only, which "
    "must stay secret."
)
_LOSS_SHOWN = (
    "The training loss was shown, which is computed from the data without noise: the "
    "guarantee does not hold for who has seen it."
)


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


def summary_of(
    job: Job, position: Any, ledger: PrivacyLedger, seed_fixed: bool
) -> dict[str, Any]:
    """What ``summary.json`` holds: what a run reached, by what, and what it spent.

    Args:
        job: the run.
        position: a `dp_ilg.experiments.runs.trainer.Position`, after the last step.
        ledger: of the run, complete.
        seed_fixed: whether its keys came from a seed.

    Returns:
        Plain values by name.

    Privacy:
        Released values, public facts, and accuracy on the test set, which the guarantee
        does not cover. The training loss, if it was shown, is not in it.

    Example:
        >>> import inspect
        >>> list(inspect.signature(summary_of).parameters)
        ['job', 'position', 'ledger', 'seed_fixed']
    """
    summary = {
        **answered(job, answer_fn(job)(position.kept)),
        "epsilon": ledger.epsilon(),
        "delta": job.plan.delta,
        "steps": ledger.steps,
        "seconds": round(position.seconds, 3),
        "finished": now(),
        "params_sha256": params_sha256(position.kept),
        "ledger_sha256": file_sha256(ledger.path),
        **_ways(job),
        "num_params": sum(np.size(p) for p in jax.tree.leaves(position.params)),
        **_guarantee(job.plan),
        "seed_fixed": seed_fixed,
        "seed_note": _FIXED_SEED if seed_fixed else _FRESH_KEYS,
        "unprotected_train_loss_shown": job.config.run.unprotected_train_loss,
        "versions": versions(),
    }
    perplexity = perplexity_fn(job)
    if perplexity is not None:
        summary["test_perplexity"] = perplexity(position.kept)
    if job.config.metrics.release:
        reader = job.make_optimizer(jax.random.key(0))
        summary["released"] = told(reader.metrics(position.state))
        summary["released_in_words"] = ", ".join(in_words(summary["released"]))
    if job.config.run.unprotected_train_loss:
        summary["warning"] = _LOSS_SHOWN
    return summary


def _ways(job: Job) -> dict[str, Any]:
    """Data, model and method of a run."""
    config = job.config
    own_model = config.model.name in MODELS
    return {
        "dataset": job.data.name,
        "outside": dict(job.outside),
        "method": config.optimizer.method,
        "made_of": ", ".join(parts_of(job.make_optimizer(jax.random.key(0)))),
        "data_note": job.data.note,
        "model": config.model.name,
        "framework": config.model.framework if own_model else "its own",
        "importance": config.optimizer.importance,
        "source": source_of_importance(config.optimizer),
        "clip_mode": config.privacy.clip_mode,
    }


def _guarantee(plan: PrivacyPlan) -> dict[str, Any]:
    """What a plan promises, and how it spends that."""
    return {
        "batch_size": plan.batch_size,
        "noise_multipliers": [z for _, z in plan.stages],
        "score_budget": plan.score_budget,
        "metric_budget": plan.metric_budget,
        "accountant": plan.accountant,
        "neighboring_relation": plan.neighboring_relation,
        "plan_digest": plan.digest(),
        "statement": plan.statement().text,
    }
