"""The trainer an audit is made on: the run's own parts, around a small data set.

Sampler, clip, scorer, noise, Adam, plan, ledger and checkpoints are those of the run;
nothing is written again here. Only the data set is smaller, so that hundreds of
whole runs fit into minutes, and the number of steps may be; the claim is that of the
plan cut to them. Every part can be replaced, which is how tests plant faults.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, LossFn, Params, PrivateTransformation
from dp_ilg.experiments.config.schema import Config, LearningRateConfig
from dp_ilg.experiments.config.sources import ProbeConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.runs import projection
from dp_ilg.experiments.runs.job import Job, build_job, load_data, ready
from dp_ilg.experiments.runs.keys import RunKeys, run_keys
from dp_ilg.experiments.runs.measures import with_itself
from dp_ilg.experiments.runs.views import publicly_seen
from dp_ilg.projection.factor_pca import FactorPca
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.checkpoints import load_checkpoint, save_checkpoint
from dp_ilg.training.step import TrainStep, make_train_step

_BATCH_SIZES = range(6, 17)  # expected sizes of a scene's batch; the best fit to q wins
_FITTED = 2048  # rows that a projection is made from, where no run has made one


@dataclass(frozen=True)
class AuditedTrainer:
    """The parts of a trainer, each as the run has it.

    Attributes:
        plan: what is claimed: rate, noise, clip norm, number of steps.
        params: where every run starts.
        examples: ``(x, y)``, NumPy, ``plan.num_examples`` rows; the last is the
            canary's place.
        num_classes: of the labels.
        loss_fn: of one example.
        clip: loss -> clipped gradient of a batch, as `dp_ilg.clipped_grad` returns.
        oracle: the same by plain per-example gradients.
        optimizer: key -> the private chain.
        sampler: key -> an object with ``indices(step)``.
        ledger: path -> a context manager with ``record(step)``.
        resume: what a run holds (any tree) -> the same after being stopped.
        keys: plan -> the `RunKeys` of a run of it; the seed is always the same.
        step: (clipped gradient, chain) -> the step of the loop, as `make_train_step`.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> trainer = audited_trainer(Config(), max_steps=3)
        >>> trainer.plan.num_steps, trainer.plan.batch_size
        (3, 13)
    """

    plan: PrivacyPlan
    params: Params
    examples: Any
    num_classes: int
    loss_fn: LossFn
    clip: Callable[[LossFn], Callable[..., ClippedGrad]]
    oracle: Callable[[LossFn], Callable[..., ClippedGrad]]
    optimizer: Callable[[Any], PrivateTransformation]
    sampler: Callable[[Any], Any]
    ledger: Callable[[Path], Any]
    resume: Callable[[Any], Any]
    keys: Callable[[PrivacyPlan], RunKeys]
    step: Callable[..., TrainStep] = make_train_step


class Tapped(NamedTuple):
    """State of a noise link that also keeps what it released last."""

    inner: Any
    release: Any


def audited_trainer(
    config: Config,
    *,
    data_dir: Path | None = None,
    plan: PrivacyPlan | None = None,
    basis: FactorPca | None = None,
    max_steps: int = 20,
    seed: int = 0,
) -> AuditedTrainer:
    """Builds the trainer of a configuration around a small data set.

    A projection of the inputs is a release of its own, which the audited claim leaves
    out, so only its form matters: without `basis` a few rows make one. Several views
    of an image are drawn under one public key, since the claim holds for every key. A
    probe is made anew within the audited steps, however seldom the run makes it.

    Args:
        config: the run.
        data_dir: where its data files are.
        plan: the plan of a run that exists; by default calibration makes one.
        basis: the projection which that run released, if it has one.
        max_steps: steps of an audited run, spread evenly over the schedule.
        seed: of the initial parameters.

    Returns:
        The trainer, with `scene_plan` of the run's plan.

    Raises:
        ValueError: in one sentence, for a configuration or data that do not fit.

    Privacy: the first rows of the training data are trained on again and again; an
        audit's output shows bounds only, but keep audits to data you may use freely.

    Example:
        >>> audited_trainer(Config(), max_steps=2).plan.num_steps
        2
    """
    data = load_data(config, data_dir)
    full = build_job(config, data_dir, plan, data)
    small = scene_plan(full.plan, max_steps)
    steady = replace(
        config,
        probe=_probed_within(config, small.num_steps),
        optimizer=replace(
            config.optimizer, learning_rate_schedule=LearningRateConfig()
        ),
        run=replace(config.run, chunk_size=None),
    )
    job = build_job(steady, data_dir, small, _first(data, small.num_examples))
    scene, key = job, run_keys(job, seed).sampler
    loss_fn = publicly_seen(config.data.augment, job.model.loss_fn)
    job = ready(job, key, basis or _small_basis(full, key))
    measured = _measured(job, loss_fn)
    rows = lambda a: np.asarray(a[: small.num_examples])  # noqa: E731
    return AuditedTrainer(
        plan=small,
        params=jax.jit(job.model.init)(jax.random.key(seed)),
        examples=(jax.tree.map(rows, job.data.x_train), rows(job.data.y_train)),
        num_classes=job.data.num_classes,
        loss_fn=loss_fn,
        clip=lambda loss: replace(job.grad_fn, loss_fn=measured(loss)),
        oracle=lambda loss: replace(
            job.grad_fn,
            loss_fn=measured(loss),
            engine="vmap",
            microbatch_size=None,
        ),
        optimizer=job.make_optimizer,
        sampler=lambda key: PoissonSampler.for_plan(small, key=key),
        ledger=lambda path: PrivacyLedger(path, small),
        resume=through_checkpoint,
        keys=lambda plan: run_keys(replace(scene, plan=plan), seed),
    )


def _probed_within(config: Config, steps: int) -> ProbeConfig:
    """Often enough for an audited run to see more than the first probe."""
    if config.optimizer.source != "probe":
        return config.probe
    every = min(config.probe.every, max(1, 2 * steps // 3))
    return replace(config.probe, every=every)


def _measured(job: Job, own: LossFn) -> Callable[[LossFn], LossFn]:
    """A loss with what the run's metrics are fed with: the run's own or any other."""
    if not job.config.metrics.release:
        return lambda loss_fn: loss_fn
    pair: Any = job.model.loss_and_right
    told = publicly_seen(job.config.data.augment, pair)
    return lambda loss_fn: told if loss_fn is own else with_itself(loss_fn)


def _first(data: Dataset, count: int) -> Dataset:
    """The first examples of a data set; its test part is not looked at."""
    cut = lambda a: a[:count]  # noqa: E731
    return replace(
        data,
        x_train=jax.tree.map(cut, data.x_train),
        y_train=data.y_train[:count],
        x_test=jax.tree.map(cut, data.x_test),
        y_test=data.y_test[:count],
    )


def _small_basis(job: Job, key: Any) -> FactorPca | None:
    """A projection of some rows with less noise, so that its directions are alike."""
    if job.raw is None:
        return None
    some, chosen = _first(job.raw, _FITTED), job.config.data.projection
    share = len(some.y_train) / len(job.raw.y_train)
    noise = (chosen.noise_multiplier or 0.0) * share
    return projection.fit(some, replace(chosen, noise_multiplier=noise), key)


def scene_plan(plan: PrivacyPlan, max_steps: int) -> PrivacyPlan:
    """A plan with the same sampling rate and noise for few examples and steps.

    Args:
        plan: of the run.
        max_steps: at most so many steps, their multipliers spread over the plan's.

    Returns:
        The plan; its rate is the nearest fraction with a batch size of 6 to 16, prior
        releases are left out, and draws are not cut (that is for tests of the sampler:
        cut draws are no Poisson sample). Its epsilon is what an audit compares with.

    Example:
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=300,
        ...     num_examples=60_000, batch_size=600, score_budget=0)
        >>> small = scene_plan(plan, 20)
        >>> small.num_examples, small.batch_size, small.stages
        (600, 6, ((20, 1.0),))
    """
    rate, most = plan.sampling_prob, plan.num_examples
    sizes = [(min(most, round(b / rate)), min(b, most)) for b in _BATCH_SIZES]
    count, size = min(sizes, key=lambda s: round(abs(s[1] / s[0] - rate) / rate, 3))
    count = max(count, plan.bands * size)
    steps = min(max(max_steps, plan.bands), plan.num_steps)
    places = np.linspace(0, plan.num_steps - 1, steps).round().astype(int)
    values, counts = [], []
    for z in plan.noise_multipliers[places]:
        if not values or values[-1] != z:
            values.append(float(z))
            counts.append(0)
        counts[-1] += 1
    return replace(
        plan,
        num_examples=count,
        batch_size=size,
        num_steps=steps,
        stages=tuple(zip(counts, values, strict=True)),
        target_epsilon=None,
        prior_releases=(),
        max_batch_size=None,
    )


def through_checkpoint(tree: Any) -> Any:
    """What a killed run comes back with: written as a checkpoint and read again.

    Args:
        tree: arrays and keys in any tree.

    Returns:
        The same, from disk.

    Raises:
        OSError: if the disk does not take it.

    Example:
        >>> float(through_checkpoint({"w": jnp.ones(())})["w"])
        1.0
    """
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 0, tree, {})
        return load_checkpoint(Path(folder), tree, {})[1]


def tapped(tx: PrivateTransformation) -> PrivateTransformation:
    """The same chain of the same links, which keeps the last release in its state.

    Args:
        tx: a chain made by `dp_ilg.chain`.

    Returns:
        The chain; `release_of` reads what its noise let out.

    Raises:
        ValueError: for a transformation that is no chain.

    Example:
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=3,
        ...     num_examples=100, batch_size=10)
        >>> tx = tapped(dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0)))
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> _, state = tx.update({"w": jnp.ones((4, 2))}, state, {"w": jnp.zeros(2)})
        >>> release_of(state)["w"].shape
        (2,)
    """
    if not tx.links:
        raise ValueError("The audited optimizer must be made by dp_ilg.chain.")
    return dp_ilg.chain(*map(_tap, tx.links))


def _tap(link: Any) -> Any:
    if getattr(link, "role", "") != "noise":
        return link

    def init(params: Params) -> Tapped:
        return Tapped(link.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Tapped, params: Any = None, **extra: Any) -> Any:
        release, inner = link.update(updates, state.inner, params, **extra)
        return release, Tapped(inner, release)

    return PrivateTransformation(
        init, update, role="noise", key=link.key, plan=link.plan
    )


def release_of(state: tuple) -> Params:
    """The last release of a tapped chain, a mean gradient."""
    (found,) = [part.release for part in state if isinstance(part, Tapped)]
    return found


def joined(params: Params, updates: Params) -> Params:
    """Parameters after a step."""
    return optax.apply_updates(params, updates)


def taken(examples: Any, rows: Any) -> Any:
    """The rows of a batch; padding takes any row, its mask makes it absent."""
    return jax.tree.map(lambda a: jnp.asarray(a)[rows], examples)


def padded(indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A draw as fixed-size rows and their padding mask.

    Args:
        indices: the drawn examples.
        size: at least as many.

    Returns:
        int64 ``[size]``, bool ``[size]``.

    Example:
        >>> [part.tolist() for part in padded(np.array([4]), 2)]
        [[4, 0], [False, True]]
    """
    rows = np.zeros(size, np.int64)
    rows[: len(indices)] = indices
    return rows, np.arange(size) >= len(indices)
