"""Runs of a sweep in one process, which share what they can: data, plan, programs.

Learning rate and seed are arguments of the compiled step, so that the runs of a grid
that differ in nothing else compile once.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.config.schema import Config, DataConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.runs.evaluation import (
    answer_fn,
    params_sha256,
    perplexity_fn,
)
from dp_ilg.experiments.runs.job import Job, build_job, load_data, ready
from dp_ilg.experiments.runs.keys import RunKeys, derived_keys, identity
from dp_ilg.experiments.runs.recipe import make_plan
from dp_ilg.experiments.runs.trainer import Position, Tools, Watch, start, train
from dp_ilg.training.environment import code_digest
from dp_ilg.training.step import Chunks, make_train_step

_KEPT = 6  # projected data sets of one task: tuning's and one for each seed
_MEMORY = Path("/dev/shm")  # a ledger that need not outlive its run is not synced


class Impossible(ValueError):
    """No noise reaches the epsilon of a run.

    Example:
        >>> str(Impossible("epsilon 1e-9 cannot be reached."))
        'epsilon 1e-9 cannot be reached.'
    """


class _Group(NamedTuple):
    """What runs share that differ in learning rate and seed only."""

    name: str
    job: Job
    step: Callable[..., Any]
    measures: dict[str, Callable[[Any], float]]


class Bench:
    """Carries out one run after another.

    Privacy:
        Every run follows its plan, step by step under a ledger, with batches and noise
        of its own: runs that differ in anything share none of them, so that their
        epsilons add up. The seeds of a sweep are published, so its runs are
        measurements and protect nobody.

    Example:
        >>> from dp_ilg.experiments.config.schema import PrivacyConfig, RunConfig
        >>> config = Config(privacy=PrivacyConfig(num_steps=2, accountant="rdp"),
        ...     run=RunConfig(seed=0))
        >>> found = Bench(None).run(config, "digits")
        >>> found["status"], found["steps"]
        ('done', 2)
    """

    def __init__(self, data_dir: Path | None):
        """Remembers where data files are.

        Args:
            data_dir: a folder of data files, or None.
        """
        self._data_dir = data_dir
        self._data: dict[DataConfig, Dataset] = {}
        self._group: _Group | None = None
        self._projections: dict[tuple[DataConfig, int | None], Dataset] = {}

    def run(self, config: Config, group: str) -> dict[str, Any]:
        """Trains and evaluates once.

        Args:
            config: the run; its seed must be given.
            group: what it shares with runs that differ in learning rate and seed only.

        Returns:
            JSON values: a `status`, "done" with what was reached, or "impossible",
            "absent" (data) or "failed" with the `error` in one sentence.
        """
        try:
            return {"status": "done", **self._done(config, group)}
        except Impossible as error:
            return _not_done("impossible", error)
        except DataError as error:
            return _not_done("absent", error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            return _not_done("failed", error)

    def _done(self, config: Config, name: str) -> dict[str, Any]:
        begun = time.perf_counter()
        group = self._prepared(config, name)
        keys = _keys(group.job, config)
        if group.job.raw is not None:
            job = self._projected(group.job, config)
            group = group._replace(job=job, measures=_measures(job))
        job = group.job
        position = start(job, keys)
        position, found = _train(group, position, config.optimizer.learning_rate)
        _check_finite(position.kept, found)
        plan = job.plan
        return {
            **found,
            "epsilon_spent": plan.epsilon(position.step),
            "delta": plan.delta,
            "steps": position.step,
            "seconds": round(time.perf_counter() - begun, 3),
            "train_seconds": round(position.seconds, 3),
            "num_examples": plan.num_examples,
            "num_evaluated": len(job.data.y_test),
            "num_params": sum(p.size for p in jax.tree.leaves(position.params)),
            "params_sha256": params_sha256(position.kept),
            "plan": plan.to_json(),
        }

    def _prepared(self, config: Config, name: str) -> _Group:
        if self._group is None or self._group.name != name:
            data = self._loaded(config)
            job = build_job(config, plan=_plan(config, data), data=data)
            self._group = _Group(name, job, _step_fn(job), _measures(job))
        return self._group

    def _projected(self, job: Job, config: Config) -> Job:
        """A seed's projection is one release for all its runs: the last few are kept.

        It follows the data and how they are projected, which decide its bits.
        """
        key = (config.data, config.run.seed)
        if key not in self._projections:
            facts = {"projection": repr(config.data), "data": identity(job)["data"]}
            facts["code"] = code_digest()
            done = ready(job, derived_keys(config.run.seed, facts).sampler)
            self._projections[key] = done.data
            if len(self._projections) > _KEPT:
                del self._projections[next(iter(self._projections))]
        return dataclasses.replace(job, data=self._projections[key], raw=None)

    def _loaded(self, config: Config) -> Dataset:
        """The data of a run; that of one task is kept, whole and split."""
        data = config.data
        if data not in self._data:
            bare = dataclasses.replace(data, validation=None)
            if not any(
                dataclasses.replace(k, validation=None) == bare for k in self._data
            ):
                self._group, self._data, self._projections = None, {}, {}
            self._data[data] = load_data(config, self._data_dir)
        return self._data[data]


def _keys(job: Job, config: Config) -> RunKeys:
    """A run's own keys: its learning rate, which the job does not know, is in them."""
    facts = identity(job, config) | {"code": code_digest()}
    return derived_keys(config.run.seed, facts)


def _measures(job: Job) -> dict[str, Callable[[Any], float]]:
    found = {job.data.measure.name: answer_fn(job), "perplexity": perplexity_fn(job)}
    return {key: measure for key, measure in found.items() if measure}


def _plan(config: Config, data: Dataset) -> PrivacyPlan:
    try:
        return make_plan(config, len(data.y_train))
    except ValueError as error:
        raise Impossible(str(error)) from None


def _step_fn(job: Job) -> Callable[..., Any]:
    """Compiles ``(rate, params, state, chunks) -> (params, state)``."""

    def step(rate: Any, params: Any, state: Any, chunks: Chunks) -> Any:
        tx = job.make_optimizer(jax.random.key(0), peak=rate)
        return make_train_step(job.grad_fn, tx)(params, state, chunks)

    return jax.jit(step, donate_argnums=(1, 2))


def _train(
    group: _Group, position: Position, rate: float
) -> tuple[Position, dict[str, Any]]:
    found: dict[str, Any] = {}
    tools = Tools(
        lambda params, state, chunks: group.step(rate, params, state, list(chunks)),
        lambda at: {key: f(at.kept) for key, f in group.measures.items()},
    )
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        with PrivacyLedger(Path(folder, "ledger.jsonl"), group.job.plan) as ledger:
            watch = Watch(evaluated=found.update)
            position = train(group.job, position, ledger, watch, tools)
    return position, found


def _check_finite(params: Any, found: dict[str, Any]) -> None:
    """Raises for a run that diverged; parameters are released, so they may be read."""
    numbers = [*jax.tree.leaves(params), *found.values()]
    if not all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in numbers):
        raise ValueError(
            "The run diverged: its parameters or what they reach are no finite "
            "numbers; try a smaller learning rate."
        )


def _not_done(status: str, error: Exception) -> dict[str, Any]:
    return {"status": status, "error": sentence(error)}


def sentence(error: Exception) -> str:
    """One sentence for an error, with its kind where that says more than its words.

    Args:
        error: any exception.

    Returns:
        One line of at most 400 characters.

    Example:
        >>> sentence(MemoryError()), sentence(ValueError("epsilon is -1."))
        ('MemoryError.', 'epsilon is -1.')
    """
    words = " ".join(str(error).split())
    if not isinstance(error, ValueError):
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    words = words if len(words) <= 400 else f"{words[:399]}…"
    return words if words.endswith((".", "…", "?", "!")) else f"{words}."
