"""Checks of what a proof on real numbers leaves out: rounding, and the noise's tail.

Each looks at the trainer's own clip and noise with inputs made to break them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.accounting.correlated import cycles
from dp_ilg.auditing import delta_lower_bound
from dp_ilg.base import ClippedGrad
from dp_ilg.clipping.row_check import rows_are_independent
from dp_ilg.experiments.audits.checks import Finding
from dp_ilg.experiments.audits.residuals import Observer
from dp_ilg.experiments.audits.subject import taken
from dp_ilg.geometry.geometry import Geometry

FAR = 5.25  # standard deviations; draws from 23 bits end at 5.22 above
TAIL_DRAWS = 2e8
_AT_ONCE = 1_000_000
_LEVEL = 1e-6
_MARGIN = 1e-5
_TERMS, _WIDTH, _SPREADS = 20, 64, (0.1, 0.06, 0.04, 0.03, 2e-3, 6e-4)
_TRIES = 50  # of each spread


def tail(observer: Observer, seed: int) -> Finding:
    """How many draws of the trainer's noise lie beyond `FAR` on either side.

    Args:
        observer: of the trainer.
        seed: of the noise.

    Returns:
        Fails where one side has too few or too many draws for a normal law. A law that
        ends earlier tells of the example whose gradient lies beyond its end.
    """
    from scipy import stats

    turns = int(TAIL_DRAWS // _AT_ONCE)
    keys = jax.random.split(jax.random.key(seed), turns)
    counts = np.asarray(jax.jit(lambda k: _beyond(observer, k))(keys), np.int64)
    due = turns * _AT_ONCE * stats.norm.sf(FAR)
    low, high = stats.poisson.ppf([_LEVEL / 4, 1 - _LEVEL / 4], due)
    return Finding(
        f"{counts[0]} draws above {FAR} and {counts[1]} below -{FAR} ({due:.1f} due)",
        f"{low + 1:.0f} to {high:.0f}",
        bool(np.all(counts > low) and np.all(counts <= high)),
    )


def _beyond(observer: Observer, keys: Array) -> Array:
    """Counts over all keys; the noise link of each draws one long leaf."""
    plan, params = observer.trainer.plan, {"w": jnp.zeros(_AT_ONCE)}
    geometry = Geometry.uniform(params)
    bound = jnp.float32(plan.l2_clip_norm)
    nothing = ClippedGrad(params, jnp.zeros(1), geometry, bound)
    stddev = plan.gradient_noise_multipliers[0] * plan.l2_clip_norm

    def one(counts: Array, key: Array) -> tuple[Array, None]:
        links = observer.trainer.optimizer(key).links
        (link,) = [x for x in links if getattr(x, "role", "") == "noise"]
        release = link.update(nothing, link.init(params), params)[0]["w"]
        z = release * (plan.batch_size / stddev)
        found = jnp.stack([jnp.sum(z > FAR), jnp.sum(z < -FAR)])
        return counts + found.astype(jnp.int32), None

    return jax.lax.scan(one, jnp.zeros(2, jnp.int32), keys)[0]


def repeated_terms(observer: Observer, seed: int) -> Finding:
    """How far one example moves the sum whose products repeat and cancel.

    Blank patches, padding and one repeated token make such gradients. They are where a
    norm that is found without forming the gradient loses most digits.

    Args:
        observer: of the trainer, for its clip.
        seed: of the examples.

    Returns:
        Fails where the distance exceeds the clip norm.
    """
    trainer = observer.trainer
    params = {"w": jnp.zeros((_WIDTH, _WIDTH), jnp.float32)}
    clip = trainer.clip(lambda p, e: jnp.sum((e[0] @ p["w"]) * e[1]))
    geometry = Geometry.uniform(params)
    first, second = _cancelling(np.random.default_rng(seed), trainer.plan.l2_clip_norm)

    def one(pair: Any) -> Array:
        batch = jax.tree.map(lambda x: x[None], pair)
        return clip(params, batch, geometry=geometry).gradients["w"]

    moved = np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))((first, second)))
    lengths = np.linalg.norm(moved.astype(np.float64), axis=(1, 2))
    worst = float(np.max(lengths) / trainer.plan.l2_clip_norm)
    return Finding(
        f"{worst:.7f} of the clip norm ({len(lengths)} examples)",
        f"{1 + _MARGIN:.6f}",
        worst <= 1 + _MARGIN,
    )


def _cancelling(rng: np.random.Generator, bound: float) -> tuple[Any, Any]:
    """Terms of two kinds that are almost alike, with alternating signs."""
    firsts, seconds = [], []
    sign = np.where(np.arange(_TERMS) % 2 == 0, 1.0, -1.0)[:, None]
    for spread in np.repeat(_SPREADS, _TRIES):
        x, y = rng.standard_normal((2, _WIDTH))
        near = x + spread * rng.standard_normal(_WIDTH)
        first = np.where(sign > 0, x, near).astype(np.float32)
        second = y * sign
        length = np.linalg.norm(first.astype(np.float64).T @ second)
        second = second * 2.0 ** np.ceil(np.log2(10 * bound / length))  # exact
        firsts.append(first)
        seconds.append(second.astype(np.float32))
    return jnp.stack(firsts), jnp.stack(seconds)


def rows_apart(observer: Observer, seed: int) -> Finding:
    """Whether an example's gradient has the same bits among any others, at any place.

    Args:
        observer: of the trainer, for its clip, its model and its data.
        seed: of the choice of rows.

    Returns:
        Fails where one bit of a sum of one example differs: then it is no function of
        that example alone, which the bound on sums takes it for.
    """
    trainer = observer.trainer
    rows = np.arange(trainer.plan.num_examples)[: max(8, trainer.plan.batch_size)]
    found = rows_are_independent(
        trainer.clip(trainer.loss_fn),
        trainer.params,
        taken(trainer.examples, rows),
        geometry=observer.tx.geometry(observer.init(jax.random.key(seed))),
        seed=seed,
    )
    words = "the same bits" if found.independent else f"{found.largest:.1e} of C apart"
    return Finding(
        f"{words} in {found.compared} pairs of batches", "the same", found.independent
    )


def any_order(observer: Observer, seed: int) -> Finding:
    """Whether the sum of a lot depends on the order in which its batches come.

    Sums that round as they go depend on it. Then one example more moves the rounding
    of all others, and by more than C where lots are large.

    Args:
        observer: of the trainer, for its clip and its data.
        seed: of the state.

    Returns:
        Fails where any bit of the sum differs between orders.
    """
    trainer = observer.trainer
    geometry = observer.tx.geometry(observer.init(jax.random.key(seed)))
    clip = jax.jit(trainer.clip(trainer.loss_fn))
    rows = np.array_split(np.arange(trainer.plan.num_examples // 6 * 6), 6)
    parts = [
        clip(trainer.params, taken(trainer.examples, own), geometry=geometry)
        for own in rows
    ]
    orders = [np.random.default_rng(k).permutation(6) for k in range(8)]
    sums = [_total([parts[k] for k in order]) for order in orders]
    same = all(
        np.array_equal(a, b)
        for other in sums[1:]
        for a, b in zip(sums[0], other, strict=True)
    )
    words = "the same bits" if same else "other bits"
    return Finding(f"{words} in {len(orders)} orders of 6 batches", "the same", same)


def _total(parts: list[ClippedGrad]) -> list[np.ndarray]:
    """The sum of a lot, both of its parts, as the noise will see it."""
    total = parts[0]
    for one in parts[1:]:
        total = total + one
    parts_of_it = total.gradients, total.remainder, total.metrics
    return [np.asarray(x) for x in jax.tree.leaves(parts_of_it)]


def claimed_epsilon(observer: Observer, seed: int) -> Finding:
    """Whether the delta of the plan's own epsilon is at most the plan's delta.

    Args:
        observer: of the trainer.
        seed: unused.

    Returns:
        Fails where an independent lower bound on delta at that epsilon exceeds it.
    """
    del seed
    plan = observer.trainer.plan
    epsilon = plan.epsilon()
    if not np.isfinite(epsilon):
        return Finding("epsilon is infinite", "a finite claim", True)
    steps = cycles.samples(plan)
    share = delta_lower_bound(steps, epsilon) / plan.delta
    return Finding(
        f"at epsilon {epsilon:.4g} delta is at least {share:.4f} of the claimed one",
        "at most 1",
        share <= 1,
    )
