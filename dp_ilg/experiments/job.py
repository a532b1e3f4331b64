"""Everything a run needs, built and checked before anything is written.

A mistake in the configuration, the data or the model must cost nothing: no folder,
no step of the budget.
"""

import dataclasses
import inspect
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import dp_ilg
from dp_ilg import layers, schedules
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines import BASELINES
from dp_ilg.experiments.config import (
    Config,
    LearningRateConfig,
    OptimizerConfig,
    PrivacyConfig,
    ScheduleConfig,
)
from dp_ilg.experiments.data import LOADERS, Dataset, load_dataset
from dp_ilg.experiments.fields import given, nearest
from dp_ilg.experiments.models import Facts, Model, build_model
from dp_ilg.plan import PrivacyPlan
from dp_ilg.rules import RULES


class RunKeys(NamedTuple):
    """The secret keys of a run: who has them can subtract the noise.

    Attributes:
        params: draws the initial parameters.
        sampler: draws the batches.
        optimizer: draws the noise of scores and gradients.

    Example:
        >>> run_keys(0).sampler.shape
        ()
    """

    params: Any
    sampler: Any
    optimizer: Any


@dataclass(frozen=True)
class Job:
    """One run, ready to start.

    Attributes:
        config: what was asked for.
        data: the data set.
        plan: every number that decides the guarantee.
        model: the network.
        grad_fn: the clipped gradient of a batch.
        make_optimizer: key -> the private optimizer.

    Example:
        >>> job = build_job(Config())
        >>> job.plan.num_examples, job.plan.num_steps
        (1437, ...)
    """

    config: Config
    data: Dataset
    plan: PrivacyPlan
    model: Model
    grad_fn: Any
    make_optimizer: Callable[[Any], PrivateTransformation]


def run_keys(seed: int | None) -> RunKeys:
    """Derives the keys of a run from a seed, or draws them.

    Args:
        seed: a whole number below 2**64, or None for keys from the operating system.

    Returns:
        Three keys that have nothing to do with each other.

    Raises:
        ValueError: for a seed out of range.

    Privacy:
        A seed that can be guessed voids the guarantee against whoever guesses it; use
        one for tests and comparisons only. JAX's keys have 64 bits.

    Example:
        >>> bool((run_keys(1).sampler == run_keys(1).sampler).all())
        True
        >>> bool((run_keys(None).sampler == run_keys(None).sampler).all())
        False
    """
    if seed is None:
        seed = secrets.randbits(64)
    if not 0 <= seed < 2**64:
        raise ValueError(f"run.seed is {seed}, but must lie between 0 and 2**64 - 1.")
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")
    return RunKeys(*(jax.random.fold_in(key, use) for use in range(3)))


def build_job(
    config: Config, data_dir: Path | None = None, plan: PrivacyPlan | None = None
) -> Job:
    """Loads the data, plans the privacy and builds model and optimizer, all checked.

    Args:
        config: the run.
        data_dir: where data files are.
        plan: the plan of a run that is resumed; by default calibration makes one.

    Returns:
        The job.

    Raises:
        ValueError: in one sentence, for whatever does not fit.

    Privacy:
        With `importance = "uniform"`, public constants, past releases or a method
        without scores nothing is scored: the whole budget goes to the gradient.

    Example:
        >>> build_job(Config()).plan.epsilon() <= 8.0
        True
    """
    _check_row("data.name", config.data.name, LOADERS)
    _check_row("optimizer.importance", config.optimizer.importance, RULES)
    _check_row("optimizer.method", config.optimizer.method, BASELINES)
    options = method_options(config)
    schedule = build_schedule(config.privacy.schedule)
    data = load_dataset(config.data.name, data_dir)
    plan = plan or _plan(config, schedule, len(data.y_train))
    facts = Facts(
        jax.tree.map(lambda a: np.zeros(a.shape[1:], a.dtype), data.x_train),
        data.num_classes,
        data.num_tokens,
        data.num_categories,
    )
    model = build_model(
        config.model.name,
        facts,
        framework=config.model.framework,
        **config.model.options(),
    )
    grad_fn = dp_ilg.clipped_grad(
        model.loss_fn,
        l2_clip_norm=plan.l2_clip_norm,
        clip_mode=BASELINES[config.optimizer.method].clip_mode(**options),
        engine=config.run.engine,
        microbatch_size=config.run.microbatch_size,
    )
    make = lambda key: _optimizer(config, plan, key)  # noqa: E731
    job = Job(config, data, plan, model, grad_fn, make)
    _rehearse(job)
    return job


def build_schedule(chosen: ScheduleConfig) -> Any:
    """Makes the noise schedule of a configuration.

    Args:
        chosen: a name and its parameters.

    Returns:
        A schedule of `dp_ilg.schedules`.

    Raises:
        ValueError: for an unknown schedule or parameter, or a missing one.

    Example:
        >>> build_schedule(ScheduleConfig("linear", end=0.5)).parameters
        (0.5,)
    """
    _check_row("schedule.name", chosen.name, schedules.SCHEDULES)
    factory = schedules.SCHEDULES[chosen.name]
    known = inspect.signature(factory).parameters
    for name in chosen.options():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(
                f"The schedule {chosen.name} has no parameter {name}; {takes}."
            )
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in chosen.options():
            raise ValueError(f"The schedule {chosen.name} lacks {name}; give it.")
    return factory(**chosen.options())


def learning_rate(config: LearningRateConfig, peak: float, num_steps: int) -> Any:
    """Makes the learning rate of a configuration: a number or an Optax schedule.

    Args:
        config: the shape.
        peak: the learning rate after the warm-up.
        num_steps: length of the run.

    Returns:
        What Optax takes as ``learning_rate``.

    Raises:
        ValueError: for a warm-up as long as the run.

    Example:
        >>> rate = learning_rate(LearningRateConfig("linear", 10), 1.0, 110)
        >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rest = num_steps - config.warmup_steps
    if rest < 1:
        raise ValueError(
            f"optimizer.learning_rate_schedule.warmup_steps is {config.warmup_steps}, "
            f"but must be below privacy.num_steps = {num_steps}."
        )
    bodies = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.end),
        "linear": lambda: optax.linear_schedule(peak, peak * config.end, rest),
    }
    if not config.warmup_steps:
        return peak if config.name == "constant" else bodies[config.name]()
    warm = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warm, bodies[config.name]()], [config.warmup_steps])


def method_options(config: Config) -> dict[str, Any]:
    """The options of the method that a configuration changes from their defaults.

    Args:
        config: the run; its method must be a row.

    Returns:
        Keyword arguments for the row, without layers.

    Raises:
        ValueError: for an option that the method does not have.

    Example:
        >>> chosen = OptimizerConfig(method="dp_sgd", momentum=0.9)
        >>> method_options(Config(optimizer=chosen))
        {'momentum': 0.9}
    """
    row = BASELINES[config.optimizer.method]
    known = {*row.options()}
    if not row.name.startswith("dp_adam_ilg"):
        known -= {"floor"}  # there it is a gradient's entry, not a share
    found = {"optimizer": _changed(config.optimizer), "privacy": {}}
    if config.privacy.clip_mode != PrivacyConfig.clip_mode:
        found["privacy"] = {"clip_mode": config.privacy.clip_mode}
    for section, options in found.items():
        for name in options:
            if name not in known:
                raise ValueError(
                    f"optimizer.method is {row.name}, which has no option {name}; "
                    f"leave {section}.{name} out."
                )
    return found["optimizer"] | found["privacy"]


def _changed(chosen: OptimizerConfig) -> dict[str, Any]:
    """What differs from the defaults, but for what every method has."""
    every = "learning_rate learning_rate_schedule method layers blocks frozen".split()
    usual = {f.name: f.default for f in dataclasses.fields(chosen)}
    values = given(chosen, *every)
    return {k: v for k, v in values.items() if v != usual[k]}


def _plan(config: Config, schedule: Any, num_examples: int) -> PrivacyPlan:
    privacy = config.privacy
    row = BASELINES[config.optimizer.method]
    scored = row.spends_scores(**method_options(config))
    return dp_ilg.plan_privacy(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        num_examples=num_examples,
        batch_size=privacy.batch_size,
        num_steps=privacy.num_steps,
        schedule=schedule,
        score_budget=privacy.score_budget if scored else 0.0,
        l2_clip_norm=privacy.l2_clip_norm,
        accountant=privacy.accountant,
        neighboring_relation=privacy.neighboring_relation,
        num_stages=privacy.num_stages,
    )


def _optimizer(config: Config, plan: PrivacyPlan, key: Any) -> PrivateTransformation:
    chosen = config.optimizer
    rate = learning_rate(
        chosen.learning_rate_schedule, chosen.learning_rate, plan.num_steps
    )
    row = BASELINES[chosen.method]
    return row(rate, plan, key=key, layers=_layering(chosen), **method_options(config))


def _layering(chosen: OptimizerConfig) -> Any:
    cuts = [
        layers.blocks(b.path, axis=b.axis, edges=b.edges, num_blocks=b.num_blocks)
        for b in chosen.blocks
    ]
    by = {"module": layers.by_module, "leaf": layers.by_leaf}[chosen.layers]
    return by(*cuts, frozen=chosen.frozen)


def _rehearse(job: Job) -> None:
    """Traces one step on shapes alone: what cannot train is refused before it starts.

    The optimizer's state is made from shapes with a key that nothing else uses.
    """

    def step(x: Any, y: Any) -> Any:
        params = job.model.init(jax.random.key(0))
        tx = job.make_optimizer(jax.random.key(0))
        state = tx.init(params)
        clipped = job.grad_fn(params, (x, y), geometry=tx.geometry(state))
        return tx.update(clipped, state, params)

    rows = lambda a: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype)  # noqa: E731
    jax.eval_shape(step, jax.tree.map(rows, job.data.x_train), rows(job.data.y_train))


def _check_row(place: str, name: str, table: Any) -> None:
    if name not in table:
        raise ValueError(
            f"{place} is {name!r}, which is unknown; {nearest(name, table)}"
        )
