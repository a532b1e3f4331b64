"""What a step released, less what it should have: the auditor's view of a step.

The auditor knows the data, the batch and the plan, so it can take the clipped sum off
the release and measure what is left in the noise's own units. In a sound trainer that
is standard normal, in every group, and so is what is left of the score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.accounting.correlated import strategies
from dp_ilg.base import ClippedGrad, Params
from dp_ilg.baselines.quantile import AdaptClipNormState
from dp_ilg.baselines.slack import AdaptBySlackState
from dp_ilg.clipping.adding.metric_sums import reach_of
from dp_ilg.experiments.audits.subject import (
    AuditedTrainer,
    joined,
    padded,
    release_of,
    taken,
    tapped,
)
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.noise.add_noise import multiplier_at, noise_stddev
from dp_ilg.optimizers.importance import ScoreLayerImportanceState
from dp_ilg.optimizers.metric_links import metrics_place
from dp_ilg.optimizers.public.link import ProbeImportanceState


class Seen(NamedTuple):
    """A gradient in units of its planned noise; score and metrics in sensitivity's.

    Attributes:
        gradient: whitened leaves, float32; frozen ones are empty.
        score: ``[scores]``, to be divided by tau; empty without a score.
        metrics: ``[metrics]``, to be divided by their multiplier; empty without.
    """

    gradient: list
    score: Any
    metrics: Any


class ScoreRow(NamedTuple):
    """How a scorer's state tells what it released.

    Attributes:
        released: ``(before, after, decay, batch_size)`` -> the noisy sum.
        statistic: ``(ClippedGrad, after)`` -> the sum before noise.
        unit: ``(ClippedGrad, after)`` -> how far one example moves it, in L2.
        multipliers: plan -> the noise multipliers of the release, step by step.
    """

    released: Callable[..., Any]
    statistic: Callable[..., Any]
    unit: Callable[..., Any]
    multipliers: Callable[[Any], Any] = lambda plan: plan.score_noise_multipliers


def _count(clipped: ClippedGrad, state: AdaptClipNormState) -> Array:
    fits: Any = clipped.fits
    return fits[1:] if state.fitting.ndim else fits[:1]


SCORES: dict[type, ScoreRow] = {
    ScoreLayerImportanceState: ScoreRow(
        lambda a, b, decay, size: (b.average - decay * a.average) / (1 - decay) * size,
        lambda clipped, state: clipped.layer_shares,
        lambda clipped, state: 1.0,
    ),
    AdaptClipNormState: ScoreRow(
        lambda a, b, decay, size: jnp.atleast_1d(b.fitting - 0.5) * size,
        _count,
        lambda clipped, state: jnp.sqrt(_count(clipped, state).size) / 2,
    ),
    AdaptBySlackState: ScoreRow(
        lambda a, b, decay, size: jnp.atleast_1d(b.slack) * size,
        lambda clipped, state: clipped.layer_shares[:1],
        lambda clipped, state: 1.0,
        lambda plan: plan.gradient_noise_multipliers,
    ),
}


@dataclass(frozen=True)
class Observer:
    """Runs a trainer's own steps and says what they released.

    Attributes:
        trainer: the trainer.
        tx: its chain, tapped.
        place: where in the chain the charged scorer is, or None.
        decay: of that scorer's running average.
        told: where in the chain metrics are released, or None.
    """

    trainer: AuditedTrainer
    tx: Any
    place: int | None
    decay: float
    told: int | None = None

    @cached_property
    def init(self) -> Callable[[Any], Any]:
        """From a key to fresh optimizer state; compiled once, as a probe takes long."""
        fresh = lambda key: tapped(self.trainer.optimizer(key))  # noqa: E731
        return jax.jit(lambda key: fresh(key).init(self.trainer.params))

    @cached_property
    def states(self) -> Callable[[Any], Any]:
        """From keys to fresh states of several runs, along the axes of `over_runs`."""
        return jax.jit(jax.vmap(self.init, out_axes=self._axes))

    @cached_property
    def _axes(self) -> Any:
        """Axis 0 of all of a state, but none of the step that a probe counts."""
        is_probe = lambda x: isinstance(x, ProbeImportanceState)  # noqa: E731
        of_probe: Any = ProbeImportanceState._make((None, 0, 0))
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        axes = lambda x: of_probe if is_probe(x) else 0  # noqa: E731
        return jax.tree.map(axes, shapes, is_leaf=is_probe)

    def over_runs(self, one: Callable[..., Any]) -> Callable[..., Any]:
        """A step of one run as a step of several, which are at the same step.

        So a probe is made where it is due: were each run at a step of its own, all
        would make it at every step, and choose afterwards.

        Args:
            one: ``(params, state, ...) -> (params, state, more)``.

        Returns:
            The same with a leading axis of everything.
        """

        def many(params: Params, state: Any, *rest: Any) -> Any:
            ins = (0, self._axes, *(0 for _ in rest))
            return jax.vmap(one, ins, (0, self._axes, 0))(params, state, *rest)

        return many

    def many_params(self, count: int) -> Params:
        """The starting parameters of several runs."""
        copy = lambda p: jnp.broadcast_to(p, (count, *p.shape))  # noqa: E731
        return jax.tree.map(copy, self.trainer.params)

    def others(self, params: Params, state: Any, rows: Any, mask: Any) -> ClippedGrad:
        """The clipped sum of a batch, by the trainer's own clip."""
        batch = taken(self.trainer.examples, rows)
        clip = self.trainer.clip(self.trainer.loss_fn)
        geometry = self.tx.geometry(state)
        return clip(params, batch, geometry=geometry, is_padding_example=mask)

    def step(self, params: Params, state: Any, total: ClippedGrad) -> tuple:
        """Noise, score, Adam: the trainer's own chain."""
        updates, state = self.tx.update(total, state, params)
        return joined(params, updates), state

    def left(self, before: Any, after: Any, known: ClippedGrad) -> Seen:
        """What remains of the releases of a step once a known sum is taken off.

        Args:
            before: the state before the step.
            after: the state after it.
            known: the clipped sum the auditor knows of.

        Returns:
            Standard normal leaves if that was all, and the score's noise. With bands
            it is the noise of the step, in units of its fresh draw (`blocks.fresh`).
        """
        plan, release = self.trainer.plan, release_of(after)
        geometry = known.geometry
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(release)]
        leaves = geometry.unrestored(leaves)
        sums = jax.tree.leaves(known.gradients)
        gaps = [r * plan.batch_size - s for r, s in zip(leaves, sums, strict=True)]
        gradient = self._whitened(geometry, gaps, self._time(before))
        metrics = self._metrics_left(after, known)
        if self.place is None:
            return Seen(gradient, jnp.zeros(0), metrics)
        old, new = before[self.place], after[self.place]
        row = SCORES[type(new)]
        released = row.released(old, new, self.decay, plan.batch_size)
        score = (released - row.statistic(known, new)) / row.unit(known, new)
        return Seen(gradient, score, metrics)

    def _metrics_left(self, after: Any, known: ClippedGrad) -> Array:
        """The noise of the metrics, in units of their sensitivity."""
        if self.told is None:
            return jnp.zeros(0)
        value = after[self.told].value
        unit = reach_of(value.size) * self.trainer.plan.batch_size
        return value * unit - known.metrics.total

    def moved(self, before: Any, lone: ClippedGrad) -> Seen:
        """What one example adds to a release, in the same units.

        Args:
            before: the state before the step.
            lone: the clipped sum of that example alone.

        Returns:
            Its share of the gradient's release and of the score's.
        """
        sums = jax.tree.leaves(lone.gradients)
        gradient = self._whitened(lone.geometry, sums, self._time(before))
        metrics = jnp.zeros(0) if self.told is None else lone.metrics.total
        if self.place is None:
            return Seen(gradient, jnp.zeros(0), metrics)
        state = before[self.place]
        row = SCORES[type(state)]
        score = row.statistic(lone, state) / row.unit(lone, state)
        return Seen(gradient, score, metrics)

    def tau(self, before: Any) -> Array:
        """The planned multiplier of the score's noise; infinite without a budget."""
        plan = self.trainer.plan
        if self.place is None:
            return multiplier_at(plan.score_noise_multipliers, self._time(before))
        row = SCORES[type(before[self.place])]
        return multiplier_at(row.multipliers(plan), self._time(before))

    def metrics_multiplier(self, before: Any) -> Array:
        """The planned multiplier of the metrics' noise; infinite without a budget."""
        return multiplier_at(
            self.trainer.plan.metric_noise_multipliers, self._time(before)
        )

    def _time(self, state: Any) -> Array:
        """Which step comes next, as the noise counts."""
        (inner,) = [part.inner for part in state if hasattr(part, "release")]
        return inner.step

    def _whitened(self, geometry: Geometry, leaves: list, step: Any) -> list:
        plan = self.trainer.plan
        stddev = noise_stddev(plan, step, geometry, plan.l2_clip_norm)
        grown = strategies.growths(plan.strategy, plan.num_steps)
        stddev = stddev / multiplier_at(grown, step)  # of the fresh draw alone
        scales = geometry.groups.expand(stddev)
        facts = geometry.groups.leaves
        return [
            value / scale if leaf.groups else jnp.zeros(0)
            for leaf, value, scale in zip(facts, leaves, scales, strict=True)
        ]


def observe(trainer: AuditedTrainer) -> Observer:
    """Makes the observer of a trainer.

    Args:
        trainer: the trainer.

    Returns:
        The observer.

    Raises:
        ValueError: for a charged scorer whose releases no row of `SCORES` can read, and
            for a rule that drops layers: what has no noise has no residual.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.audits.subject import audited_trainer
        >>> observe(audited_trainer(Config(), max_steps=2)).place
        1
    """
    tx = tapped(trainer.optimizer(jax.random.key(0)))
    state = tx.init(trainer.params)
    if tx.geometry(state).drops:
        raise ValueError(
            "The audit reads the noise of every layer, but the rule top_k drops some; "
            "audit the rule inside it, such as --importance min_noise_energy."
        )
    charged = [
        i
        for i, link in enumerate(tx.links)
        if getattr(link, "role", "") == "score" and link.key is not None
    ]
    told = metrics_place(tx.links)
    if not charged:
        return Observer(trainer, tx, None, 0.0, told)
    (place,) = charged
    if type(state[place]) not in SCORES:
        raise ValueError(
            f"The audit cannot read what {type(state[place]).__name__} released; add a "
            "row to dp_ilg.experiments.audits.residuals.SCORES."
        )
    decay = _decay(tx, state, place, trainer)
    if decay == 1:  # a known sum does not move it: without a budget nothing is released
        return Observer(trainer, tx, None, 0.0, told)
    return Observer(trainer, tx, place, decay, told)


def _decay(tx: Any, state: Any, place: int, trainer: AuditedTrainer) -> float:
    """How much of its running average a scorer keeps, found by a known sum."""
    if not isinstance(state[place], ScoreLayerImportanceState):
        return 0.0
    geometry = tx.geometry(state)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainer.params)
    shares = jnp.zeros(len(geometry.groups.names), jnp.float32)

    def average(level: float) -> Any:
        bound = jnp.float32(trainer.plan.l2_clip_norm)
        total = ClippedGrad(zeros, shares + level, geometry, bound)
        return tx.links[place].update(total, state[place], trainer.params)[1].average

    size = 1e4 * trainer.plan.batch_size
    return float(1 - np.mean((average(size) - average(0.0)) / 1e4))


def draws(
    trainer: AuditedTrainer, keys: Any, keep: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batches of several runs, each drawn by the trainer's own sampler.

    Args:
        trainer: the trainer.
        keys: one sampler key a run.
        keep: drops examples the auditor handles itself from a draw.

    Returns:
        Rows ``[steps, runs, size]``, padding masks of the same shape, and whether the
        last example was drawn, bool ``[steps, runs]``. The size is the largest draw's,
        rounded up by less than a quarter, so that most draws share a compiled step.
    """
    last = trainer.plan.num_examples - 1
    samplers = [trainer.sampler(key) for key in keys]
    found = [
        [np.asarray(sampler.indices(t)) for sampler in samplers]
        for t in range(trainer.plan.num_steps)
    ]
    chosen = [[last in row for row in rows] for rows in found]
    kept = [[keep(row) for row in rows] for rows in found]
    size = max(1, max(len(row) for rows in kept for row in rows))
    grain = 2 ** max(0, size.bit_length() - 3)
    size = -(-size // grain) * grain
    pairs = [[padded(row, size) for row in rows] for rows in kept]
    rows = np.stack([[pair[0] for pair in step] for step in pairs])
    masks = np.stack([[pair[1] for pair in step] for step in pairs])
    return rows, masks, np.array(chosen)


def inner_product(params: Params, example: Params) -> Any:
    """A loss whose gradient is the example itself: any gradient can be made."""
    products = jax.tree.map(lambda p, e: jnp.sum(p * e), params, example)
    return sum(jax.tree.leaves(products))
