"""Checks of the sampler: who is drawn, how many, and whether draws know of each other.

The accountant charges a Poisson sample. A sampler that shuffles, or draws batches of
one size, has the right inclusion frequency and fails the other two.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from dp_ilg.accounting.correlated import cycles
from dp_ilg.experiments.audits.checks import Finding, normal_limit
from dp_ilg.experiments.audits.subject import AuditedTrainer

LEVEL = 1e-6  # of each check
_BERNOULLI = 1e5  # draws of one example in one step that are looked at


@dataclass(frozen=True)
class Draws:
    """Batches of many samplers, gathered once for all checks.

    Attributes:
        trainer: whose sampler.
        seed: of its keys.
    """

    trainer: AuditedTrainer
    seed: int

    @property
    def rate(self) -> float:
        """The claimed probability of an example in a step, or in a cycle of parts."""
        return cycles.sampling_rate(self.trainer.plan)

    @cached_property
    def taken(self) -> np.ndarray:
        """Who takes part: bool ``[samplers, steps, examples]``.

        With bands a cycle counts as a step, and the last ones that make no whole cycle
        are left out.
        """
        count, steps, examples = self.by_step.shape
        bands = self.trainer.plan.bands
        whole = self.by_step[:, : steps // bands * bands]
        return np.any(whole.reshape(count, -1, bands, examples), axis=2)

    @cached_property
    def by_step(self) -> np.ndarray:
        """The same for every single step."""
        plan = self.trainer.plan
        each = plan.num_steps * plan.num_examples
        count = int(np.clip(_BERNOULLI // each, 20, 400))
        keys = jax.random.split(jax.random.key(self.seed), count)
        found = np.zeros((count, plan.num_steps, plan.num_examples), bool)
        for one, key in zip(found, keys, strict=True):
            sampler: Any = self.trainer.sampler(key)
            for step, row in enumerate(one):
                row[np.asarray(sampler.indices(step))] = True
        return found


def inclusion(draws: Draws) -> Finding:
    """How often each example takes part: chi-square against the claimed rate.

    Args:
        draws: the batches.

    Returns:
        Fails for a wrong rate, or examples that are favoured.
    """
    q, count = draws.rate, draws.taken[..., 0].size
    if q == 1:
        return Finding("all take part", "all", bool(draws.taken.all()))
    from scipy import stats

    each = draws.taken.sum((0, 1))
    spread = np.sum((each - count * q) ** 2) / (count * q * (1 - q))
    p = float(min(stats.chi2.sf(spread, each.size), stats.chi2.cdf(spread, each.size)))
    overall = (each.sum() - each.size * count * q) / np.sqrt(
        each.size * count * q * (1 - q)
    )
    limit = normal_limit(LEVEL, 2)
    return Finding(
        f"rate {each.mean() / count:.5f} for {q:.5f} ({overall:+.2f} standard "
        f"deviations); spread over examples p {p:.2g}",
        f"{limit:.2f}, p above {LEVEL / 4:.1e}",
        bool(abs(overall) <= limit and p > LEVEL / 4),
    )


def batch_size(draws: Draws) -> Finding:
    """Whether the drawn size varies as a binomial one does.

    Args:
        draws: the batches.

    Returns:
        Fails for batches of fixed size, and for examples drawn together.
    """
    q, total = draws.rate, draws.trainer.plan.num_examples
    sizes = draws.taken.sum(2).astype(float)
    if q == 1:
        return Finding("all take part", "all", bool(np.all(sizes == total)))
    variance = total * q * (1 - q)
    ratio = np.mean((sizes - total * q) ** 2) / variance
    fourth = 2 + (1 - 6 * q * (1 - q)) / variance  # of the squared standard score
    limit = normal_limit(LEVEL, 1) * np.sqrt(fourth / sizes.size)
    return Finding(
        f"variance of the size {ratio:.4f} of the binomial's ({sizes.size:,} batches)",
        f"1 ± {limit:.4f}",
        bool(abs(ratio - 1) <= limit),
    )


def steps_apart(draws: Draws) -> Finding:
    """How many examples two batches share: of one run, and of two.

    Args:
        draws: the batches.

    Returns:
        Fails for a sampler that shuffles, that repeats a batch, or ignores its key.
    """
    q, taken = draws.rate, draws.taken
    if q == 1 or taken.shape[1] < 2:
        return Finding("nothing to compare", "-", True)
    even = taken.shape[1] // 2 * 2
    pairs = {
        "steps": taken[:, 0:even:2] & taken[:, 1:even:2],
        "distant steps": taken[:, : even // 2] & taken[:, even // 2 : even],
        "samplers": taken[0:-1:2] & taken[1::2][: len(taken[0:-1:2])],
    }
    spread = np.sqrt(q**2 * (1 - q**2))
    scores = {
        name: float((both.mean() - q**2) / spread * np.sqrt(both.size))
        for name, both in pairs.items()
    }
    name = max(scores, key=lambda n: abs(scores[n]))
    limit = normal_limit(LEVEL, len(scores))
    return Finding(
        f"shared by two {name}: {pairs[name].mean():.5f} for {q**2:.5f} "
        f"({scores[name]:+.2f} standard deviations)",
        f"{limit:.2f}",
        abs(scores[name]) <= limit,
    )


def turns(draws: Draws) -> Finding:
    """Whether every example takes part in the steps of one part alone.

    Args:
        draws: the batches.

    Returns:
        Fails for an example that takes part twice in as many steps as there are bands.
    """
    bands = draws.trainer.plan.bands
    if bands == 1:
        return Finding("one part", "-", True)
    steps = range(bands)
    parts = np.stack([draws.by_step[:, t::bands].any(1) for t in steps])
    most = int(parts.sum(0).max())
    return Finding(f"an example is drawn from {most} of {bands} parts", "1", most <= 1)


def repeated(draws: Draws) -> Finding:
    """Whether the batch of a step is the same whenever it is asked for.

    Args:
        draws: only its trainer is used.

    Returns:
        Fails for a sampler with a memory.
    """
    key = jax.random.key(draws.seed)
    steps = range(draws.trainer.plan.num_steps)
    first: Any = draws.trainer.sampler(key)
    forth = [np.asarray(first.indices(t)) for t in steps]
    second: Any = draws.trainer.sampler(key)
    back = [np.asarray(second.indices(t)) for t in reversed(steps)][::-1]
    same = all(np.array_equal(a, b) for a, b in zip(forth, back, strict=True))
    return Finding("the same" if same else "another batch", "the same batch", same)
