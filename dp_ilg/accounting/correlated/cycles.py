"""What correlated noise releases: one Poisson-sampled Gaussian a cycle of b steps.

The examples are dealt to b parts that are public, and step t draws from part t mod b
alone. So an example takes part at most once in b steps, what it does at step t moves
the fresh draws z_t, ..., z_(t+b-1) and no others of its own, and the Gaussian of these
b draws has the multiplier of step t. The steps of one part are composed; the parts
differ in their steps alone, so each cycle is charged with the least noise in it.

Reference: Choquette-Choo et al. 2023, Theorem 4; docs/correlated.md (adaptive weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """So many sampled Gaussians of one kind.

    Attributes:
        rate: the probability with which an example takes part.
        noise_multiplier: z.
        count: how often.
    """

    rate: float
    noise_multiplier: float
    count: int


def sampling_rate(plan: Any) -> float:
    """The probability of an example in a step of its part: b times the plan's.

    Example:
        >>> from types import SimpleNamespace
        >>> sampling_rate(SimpleNamespace(bands=4, batch_size=10, num_examples=100))
        0.4
    """
    return min(1.0, plan.bands * plan.batch_size / plan.num_examples)


def samples(plan: Any, steps: int | None = None) -> list[Sample]:
    """The sampled Gaussians of the first steps of a plan, as any accountant needs them.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.
        steps: how many steps; None for all.

    Returns:
        One entry for a run of equal ones: steps, or cycles where the plan has bands.

    Example:
        >>> from types import SimpleNamespace
        >>> samples(SimpleNamespace(stages=((5, 2.0), (3, 1.0)), bands=4, batch_size=10,
        ...     num_examples=100, num_steps=8))
        [Sample(rate=0.4, noise_multiplier=2.0, count=1), \
Sample(rate=0.4, noise_multiplier=1.0, count=1)]
    """
    left = plan.num_steps if steps is None else steps
    rate = sampling_rate(plan)
    taken = []
    for count, z in plan.stages:
        if min(count, left):
            taken.append((min(count, left), z))
        left -= min(count, left)
    if plan.bands == 1:
        return [Sample(rate, z, count) for count, z in taken]
    runs = itertools.groupby(_least(taken, plan.bands))
    return [Sample(rate, z, len(list(same))) for z, same in runs]


def _least(stages: list[tuple[int, float]], bands: int) -> Iterator[float]:
    """The least noise of every cycle."""
    steps = itertools.chain.from_iterable(itertools.repeat(z, n) for n, z in stages)
    while cycle := list(itertools.islice(steps, bands)):
        yield min(cycle)
