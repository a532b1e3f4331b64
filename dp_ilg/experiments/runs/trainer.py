"""The private training loop: sample, charge, step, and now and then evaluate.

The order is the guarantee's: a step is on disk in the ledger before its release
exists, and batch and noise are functions of (key, step), so that a run that stopped
repeats what it had begun.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import PrivateTransformation
from dp_ilg.experiments.runs.evaluation import (
    answer_fn,
    answered,
    perplexity_fn,
    unprotected_loss_fn,
)
from dp_ilg.experiments.runs.job import Job
from dp_ilg.experiments.runs.keys import program_digest
from dp_ilg.experiments.runs.measures import told
from dp_ilg.noise.add_noise import noise_stddev
from dp_ilg.noise.exact import ExactNoise
from dp_ilg.noise.repeats import next_digest, release_digest
from dp_ilg.optimizers.averaging import averaged_params
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.draws_ahead import DrawsAhead
from dp_ilg.training.feeds import Feed
from dp_ilg.training.step import TrainStep, make_train_step

_AHEAD = 2  # chunks fetched before their step begins


class Position(NamedTuple):
    """Where a run stands: all that a checkpoint holds.

    Attributes:
        step: steps taken.
        params: the parameters.
        state: the optimizer's state, with its keys.
        sampler_key: draws the batches.
        seconds: time spent so far.
        trail: the digest of what the next step is released from, once it is known.

    Example:
        >>> Position(0, {}, (), jax.random.key(0), 0.0).step
        0
    """

    step: int
    params: Any
    state: Any
    sampler_key: Any
    seconds: float
    trail: str = ""

    @property
    def kept(self) -> Any:
        """The parameters that are judged and handed on: the average, if one is kept."""
        return averaged_params(self.state, self.params)


@dataclass(frozen=True)
class Watch:
    """What the loop tells while it runs; every function may do nothing.

    Attributes:
        stepped: called with the steps taken after each one.
        evaluated: called with the record of an evaluation.
        save: called with the position where a checkpoint is due.
        stop: asked after each step whether to stop there.

    Example:
        >>> Watch().stop()
        False
    """

    stepped: Callable[[int], Any] = lambda step: None
    evaluated: Callable[[dict[str, Any]], Any] = lambda record: None
    save: Callable[[Position], Any] = lambda position: None
    stop: Callable[[], bool] = lambda: False


def start(job: Job, keys: Any) -> Position:
    """The position before the first step.

    Args:
        job: the run.
        keys: its `RunKeys`.

    Returns:
        Fresh parameters and optimizer state.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> from dp_ilg.experiments.runs.keys import run_keys
        >>> job = build_job(Config())
        >>> start(job, run_keys(job, 0)).step
        0
    """
    params = jax.jit(job.model.init)(keys.params)
    state = job.make_optimizer(keys.optimizer).init(params)
    # Donated buffers must be the run's own: constants may be shared.
    params, state = jax.tree.map(jnp.copy, (params, state))
    return Position(0, params, state, keys.sampler, 0.0)


@runtime_checkable
class Records(Protocol):
    """Whatever a step is written down in before it is taken, such as a ledger.

    Example:
        >>> from dp_ilg.accounting.ledger import PrivacyLedger
        >>> issubclass(PrivacyLedger, Records)
        True
    """

    def record(self, step: int, *, released_from: Any) -> None:
        """Returns once the step is on disk, or raises.

        `released_from` is a digest of what the step is released from.
        """
        ...


class Tools(NamedTuple):
    """What the loop calls; runs that differ in their keys only may share it.

    Attributes:
        step: ``(params, state, chunks) -> (params, state)``.
        evaluate: position -> the record of an evaluation.
        rows: the sampler of a run -> that of the rows which are read here.
        place: puts a batch and its mask where the step wants them.
        local: a position -> the same one, whole on one device here.
        draws: a step -> its noise, where the host draws it; else None.

    Example:
        >>> Tools._fields[:2]
        ('step', 'evaluate')
    """

    step: TrainStep
    evaluate: Callable[[Position], dict[str, Any]]
    rows: Callable[[PoissonSampler], PoissonSampler] = lambda sampler: sampler
    place: Callable[[Any], Any] = jax.device_put
    local: Callable[[Position], Position] = lambda position: position
    draws: Callable[[int], Any] | None = None


def make_tools(job: Job) -> Tools:
    """Makes the compiled functions of a run.

    Args:
        job: the run.

    Returns:
        Step and evaluation.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> callable(make_tools(build_job(Config())).step)
        True
    """
    tx = job.make_optimizer(jax.random.key(0))  # the real keys are in the state
    return Tools(make_train_step(job.grad_fn, tx), _evaluator(job, tx))


def with_exact_noise(
    tools: Tools | None, job: Job, position: Position, secret: str | None
) -> Tools | None:
    """The tools with the draws that a plan of exact noise asks for.

    Args:
        tools: of the run; None for those that are made here.
        job: the run.
        position: of the run, for shapes.
        secret: 64 hexadecimal digits, from the run's checkpoints.

    Returns:
        The same tools where noise is drawn in the compiled step.

    Raises:
        ValueError: without a secret for such a plan.

    Privacy: the secret is as secret as the keys, and stays in the checkpoints.

    Example:
        >>> import inspect
        >>> list(inspect.signature(with_exact_noise).parameters)[-1]
        'secret'
    """
    if not job.plan.exact_noise:
        return tools
    if secret is None:
        raise ValueError(
            "The checkpoint holds no secret for exact noise; begin a new run folder."
        )
    geometry = job.make_optimizer(jax.random.key(0)).geometry(position.state)
    shapes = jax.eval_shape(lambda params: params, position.params)
    source = ExactNoise(secret=bytes.fromhex(secret))
    tools = tools or make_tools(job)
    return tools._replace(draws=lambda step: source.draws(step, shapes, geometry))


def train(
    job: Job,
    position: Position,
    ledger: Records,
    watch: Watch,
    tools: Tools | None = None,
) -> Position:
    """Trains to the end of the plan, or until told to stop.

    Args:
        job: the run.
        position: where to go on; its buffers are consumed.
        ledger: records every step before it is taken.
        watch: what to tell.
        tools: the compiled functions, by default made here.

    Returns:
        The last position.

    Raises:
        BudgetExhausted: past the plan.
        ValueError: if the inputs have not been projected, see `job.ready`.
        OSError: if ledger or checkpoint cannot be written.

    Privacy:
        The plan's guarantee for everything `watch` is told, released metrics among it,
        but for the unprotected loss, computed only if the configuration asks for it.

    Example:
        >>> import inspect
        >>> list(inspect.signature(train).parameters)
        ['job', 'position', 'ledger', 'watch', 'tools']
    """
    step_fn, evaluate, rows, place, local, draws = tools or make_tools(job)
    sized = dict(key=position.sampler_key, chunk_size=job.config.run.chunk_size)
    sampler = rows(PoissonSampler.for_plan(job.plan, **sized))
    every, save_every = job.config.run.eval_every, job.config.run.checkpoint_every
    program = program_digest(job)
    began = time.perf_counter() - position.seconds
    source = job.source(position.sampler_key)
    feed = Feed(source, sampler, first=position.step, ahead=_AHEAD, place=place)
    noise = DrawsAhead(draws or (lambda step: None), job.plan.num_steps)
    with feed, noise:
        for t in range(position.step, job.plan.num_steps):
            chunks = feed.chunks(t)
            position = _followed(position, local, save_every)
            ledger.record(t, released_from=f"{position.trail} {program}")
            given = () if draws is None else (noise.of(t),)
            params, state = step_fn(position.params, position.state, chunks, *given)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - began
            position = position._replace(
                step=t + 1, params=params, state=state, seconds=seconds
            )
            watch.stepped(t + 1)
            done, stopped = t + 1 == job.plan.num_steps, watch.stop()
            if done or (t + 1) % every == 0:
                watch.evaluated(evaluate(position))
            if done or stopped or (t + 1) % save_every == 0:
                watch.save(local(position))
            if stopped:
                break
    return position


def _followed(
    position: Position, local: Callable[[Position], Position], save_every: int
) -> Position:
    """The position with the digest of what its next step is released from.

    Taken from the parameters where checkpoints are due, whether or not the run was
    stopped in between, and from the digest before elsewhere: the same in every repeat.
    """
    if position.trail and position.step % save_every:
        return position._replace(trail=next_digest(position.trail))
    here = local(position)
    trail = release_digest((here.params, here.state), "at a checkpoint")
    return position._replace(trail=trail)


def _evaluator(
    job: Job, tx: PrivateTransformation
) -> Callable[[Position], dict[str, Any]]:
    answer, perplexity = answer_fn(job), perplexity_fn(job)
    loss = unprotected_loss_fn(job) if job.config.run.unprotected_train_loss else None

    def evaluate(position: Position) -> dict[str, Any]:
        record = {
            "step": position.step,
            "epsilon": job.plan.epsilon(position.step),
            **answered(job, answer(position.kept)),
            "seconds": round(position.seconds, 3),
            "noise_multiplier": float(job.plan.noise_multipliers[position.step - 1]),
            "layers": _layers(job, tx, position),
        }
        if perplexity is not None:
            record["test_perplexity"] = perplexity(position.kept)
        if loss is not None:
            record["unprotected_train_loss"] = loss(position.kept)
        if tx.metrics is not None:
            record["released"] = told(tx.metrics(position.state))
        return record

    return evaluate


def _layers(job: Job, tx: PrivateTransformation, position: Position) -> dict[str, Any]:
    """What was released about the layers; the noise is that on the mean gradient."""
    geometry = tx.geometry(position.state)
    last = jnp.int32(position.step - 1)
    shown = dataclasses.replace(geometry, weights=geometry.noise_scale())
    stddev = noise_stddev(job.plan, last, shown, jnp.float32(job.plan.l2_clip_norm))
    return {
        "names": list(geometry.groups.names),
        "sizes": list(geometry.groups.sizes),
        "importance": np.asarray(tx.importance(position.state)).tolist(),
        "weights": np.asarray(geometry.weights).tolist(),
        "noise_stddev": (np.asarray(stddev) / job.plan.batch_size).tolist(),
    }
