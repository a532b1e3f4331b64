"""Checks of the noise: its law, its independence, and what the plan charges for it.

All are tests on what is left of the releases of many short runs once the clipped sums
are taken off, at a level that ten audits a day would miss once in years.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.accounting.correlated import strategies
from dp_ilg.base import Params
from dp_ilg.experiments.audits.blocks import fresh
from dp_ilg.experiments.audits.checks import Finding, normal_limit
from dp_ilg.experiments.audits.residuals import Observer, draws
from dp_ilg.geometry.groups import pieces_of

LEVEL = 1e-6  # of each check
_DRAWS = 1.5e6  # noise draws looked at, as far as that many runs are affordable
_MOST_RUNS, _LEAST_RUNS = 1024, 4
_KS_DRAWS = 20_000
_SEGMENT = 4096  # entries of a leaf that enter correlations


@dataclass(frozen=True)
class Noise:
    """Whitened noise of many runs, gathered once for all checks.

    Attributes:
        observer: of the trainer.
        seed: of batches and noise.
    """

    observer: Observer
    seed: int

    @cached_property
    def leaves(self) -> list[np.ndarray]:
        """Per trained leaf, ``[runs, steps, *shape]``; standard normal if sound."""
        return self._gathered[0]

    @cached_property
    def scores(self) -> np.ndarray:
        """``[runs, steps, scores]`` in units of the sensitivity, not of tau."""
        return self._gathered[1]

    @cached_property
    def metrics(self) -> np.ndarray:
        """``[runs, steps, metrics]`` in units of their sensitivity."""
        return self._gathered[2]

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The same draws by group, one flat array each."""
        geometry = self.observer.tx.geometry(self.observer.init(jax.random.key(0)))
        found: list[list] = [[] for _ in geometry.groups.names]
        trained = [leaf for leaf in geometry.groups.leaves if leaf.groups]
        for leaf, value in zip(trained, self.leaves, strict=True):
            for start, stop, owner in pieces_of(leaf):
                cut = (slice(None),) * (2 + leaf.axis) + (slice(start, stop),)
                found[owner].append((value[cut] if leaf.edges else value).ravel())
        return [np.concatenate(parts) for parts in found]

    @cached_property
    def _gathered(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        trainer = self.observer.trainer
        size = sum(np.size(p) for p in jax.tree.leaves(trainer.params))
        wanted = _DRAWS / (size * trainer.plan.num_steps)
        runs = int(np.clip(np.ceil(wanted), _LEAST_RUNS, _MOST_RUNS))
        keys = jax.random.split(jax.random.key(self.seed), (2, runs))
        rows, masks, _ = draws(trainer, keys[0], lambda row: row)
        step = _oracle_step(self.observer)
        params, state = self.observer.many_params(runs), self.observer.states(keys[1])
        found, drawn = [], []
        for t in range(trainer.plan.num_steps):
            params, state, left = step(params, state, rows[t], masks[t])
            found.append(jax.tree.map(np.asarray, left))
            drawn.append(fresh(trainer.plan, [f.gradient for f in found]))
        leaves = [np.stack(x, 1) for x in zip(*drawn, strict=True)]
        scores = np.stack([f.score for f in found], 1)
        metrics = np.stack([f.metrics for f in found], 1)
        return [x for x in leaves if x.size], scores, metrics


def _oracle_step(observer: Observer) -> Any:
    """A step whose known sum comes from plain per-example gradients."""
    trainer = observer.trainer
    oracle = trainer.oracle(trainer.loss_fn)

    def one(params: Params, state: Any, rows: Any, mask: Any) -> tuple:
        total = observer.others(params, state, rows, mask)
        batch = jax.tree.map(lambda a: jnp.asarray(a)[rows], trainer.examples)
        geometry = observer.tx.geometry(state)
        known = oracle(params, batch, geometry=geometry, is_padding_example=mask)
        params, after = observer.step(params, state, total)
        return params, after, observer.left(state, after, known)

    return jax.jit(observer.over_runs(one))


def gradient_noise(noise: Noise) -> Finding:
    """Variance of the gradient's noise in every group, and its shape.

    Args:
        noise: the draws.

    Returns:
        Fails for noise that is too small or too large in any group, or not Gaussian.
    """
    from scipy import stats

    tests = len(noise.groups) + 2
    everything = np.concatenate(noise.groups).astype(np.float64)
    if not np.all(np.isfinite(everything)):
        return Finding("a release is not finite", "all are", False)
    ratios = [_variance(g) for g in [*noise.groups, everything]]
    worst = max(ratios, key=lambda r: abs(r[0] - 1) / r[1])
    some = np.random.default_rng(0).choice(everything, _KS_DRAWS)
    shape = float(stats.kstest(some, "norm").pvalue)
    limit = normal_limit(LEVEL, tests) * worst[1]
    return Finding(
        f"variance {worst[0]:.5f} of the plan's in the worst group (1 expected, "
        f"{everything.size:,} draws); Kolmogorov-Smirnov p {shape:.2g}",
        f"1 ± {limit:.5f}, p above {LEVEL / tests:.0e}",
        all(abs(r - 1) <= normal_limit(LEVEL, tests) * s for r, s in ratios)
        and shape > LEVEL / tests,
    )


def _variance(draws: np.ndarray) -> tuple[float, float]:
    """Mean square, and its standard deviation if they are standard normal."""
    wide = np.asarray(draws, np.float64)
    return float(np.mean(wide**2)), float(np.sqrt(2 / wide.size))


def score_noise(noise: Noise) -> Finding:
    """Variance of the score's noise.

    Args:
        noise: the draws.

    Returns:
        Fails for a score whose noise is not the plan's.
    """
    tau = noise.observer.trainer.plan.score_noise_multipliers
    return _of_the_plan("score", noise.scores, tau)


def metric_noise(noise: Noise) -> Finding:
    """Variance of the noise of released metrics.

    Args:
        noise: the draws.

    Returns:
        Fails for metrics whose noise is not the plan's.
    """
    plan = noise.observer.trainer.plan
    return _of_the_plan("metric", noise.metrics, plan.metric_noise_multipliers)


def _of_the_plan(name: str, draws: np.ndarray, planned: np.ndarray) -> Finding:
    """Whether noise in units of its sensitivity has the planned multipliers."""
    if not draws.size:
        return Finding(f"no {name} is released", "-", True)
    if not np.all(np.isfinite(planned)):
        words = f"a {name} is released, its planned noise is infinite"
        return Finding(words, "-", False)
    ratio, spread = _variance(draws / planned[:, None])
    limit = normal_limit(LEVEL, 1) * spread
    return Finding(
        f"variance {ratio:.4f} of the plan's ({draws.size:,} draws)",
        f"1 ± {limit:.4f}",
        abs(ratio - 1) <= limit,
    )


def charge(noise: Noise) -> Finding:
    """All that a step releases, together: at least the multiplier z accounted.

    Measured, not read: ``(sigma^-2 + tau^-2 + mu^-2)^(-1/2)`` of gradient, score and
    metrics, from the noise that is there.

    Args:
        noise: the draws.

    Returns:
        Fails where they release more than the plan accounts.
    """
    plan = noise.observer.trainer.plan
    sigma = plan.gradient_noise_multipliers / strategies.length(plan.strategy)
    found, spread = _variance(np.concatenate(noise.groups))
    inverse, error = 1 / (found * sigma**2), 0.0
    for part in (noise.scores, noise.metrics):
        if not part.size:
            continue
        square = np.mean(np.asarray(part, np.float64) ** 2, axis=(0, 2))
        level = max(np.mean(square / plan.noise_multipliers**2), 1e-30)
        extra = 1 / (level * plan.noise_multipliers**2)
        inverse = inverse + extra
        error = np.hypot(error, np.max(extra / inverse) * np.sqrt(2 / part.size))
    ratio = float(np.min(1 / np.sqrt(inverse) / plan.noise_multipliers))
    limit = normal_limit(LEVEL, 1) * np.hypot(spread / 2, error / 2)
    return Finding(
        f"joint multiplier {ratio:.5f} of what the plan accounts",
        f"at least {1 - limit:.5f}",
        bool(ratio >= 1 - limit),
    )


def independence(noise: Noise) -> Finding:
    """Correlations over steps, leaves, runs, neighbouring entries, and between parts.

    Args:
        noise: the draws.

    Returns:
        Fails for a key that is used twice.
    """
    pairs = list(_pairs(noise))
    scores = [(abs(_correlation(a, b)), name) for name, a, b in pairs]
    worst, name = max(scores)
    limit = normal_limit(LEVEL, len(pairs))
    return Finding(
        f"largest of {len(pairs)} correlations is {worst:.2f} standard deviations "
        f"({name})",
        f"{limit:.2f}",
        bool(worst <= limit),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays of independent standard normals, in standard deviations.

    Scaled by what is there, so that noise of the wrong size is another check's.
    """
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    scale = np.sqrt(np.mean(x**2) * np.mean(y**2))
    return float(np.mean(x * y) / scale * np.sqrt(x.size)) if scale > 0 else 0.0


def _pairs(noise: Noise) -> Any:
    """(what, one, other) of draws that must have nothing to do with each other."""
    flat = [x.reshape(*x.shape[:2], -1)[..., :_SEGMENT] for x in noise.leaves]
    steps = range(flat[0].shape[1])
    for s, t in combinations(steps, 2):
        parts = [np.concatenate([x[:, k].ravel() for x in flat]) for k in (s, t)]
        yield f"steps {s} and {t}", *parts
        for name, small in _small(noise):
            yield f"{name}s of steps {s} and {t}", small[:, s], small[:, t]
    for (i, a), (j, b) in combinations(enumerate(flat), 2):
        size = min(a.shape[2], b.shape[2])
        yield f"leaves {i} and {j}", a[..., :size], b[..., :size]
    for i, a in enumerate(flat):
        yield f"runs, leaf {i}", a[1:], a[:-1]
        if a.shape[2] > 1:
            yield f"entries of leaf {i}", a[..., 1:], a[..., :-1]
        for name, small in _small(noise):
            size = min(a.shape[2], small.shape[2])
            yield f"{name} and leaf {i}", small[..., :size], a[..., :size]
    if len(_small(noise)) == 2:
        size = min(noise.scores.shape[2], noise.metrics.shape[2])
        pair = noise.scores[..., :size], noise.metrics[..., :size]
        yield "score and metric", *pair


def _small(noise: Noise) -> list[tuple[str, np.ndarray]]:
    """What is released beside the gradient."""
    parts = ("score", noise.scores), ("metric", noise.metrics)
    return [(name, draws) for name, draws in parts if draws.size]
