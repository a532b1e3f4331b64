"""How many bands pay: those that leave least noise in the sums of the steps.

More bands cancel more noise, and the examples wait longer for their turn: a step draws
from a part of the data at b times the rate, so that sampling hides them less. Which of
the two wins follows from the plan alone, so it is settled before training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from dp_ilg.accounting import search
from dp_ilg.accounting.correlated import strategies

CANDIDATES = (1, 2, 4, 8, 16, 32)
"""Numbers of bands that "auto" compares."""


class Choice(NamedTuple):
    """One number of bands and what it is expected to leave.

    Attributes:
        bands: b.
        strategy: its coefficients.
        noise: the root mean square noise of the sums of the first steps, per clip norm.
        relative: that over the noise of independent draws.
    """

    bands: int
    strategy: tuple[float, ...]
    noise: float
    relative: float


def sum_noise(plan: Any) -> float:
    """The noise of the sums of a plan's first steps, in units of the clip norm.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Returns:
        The root mean square over the steps t of the standard deviation of what the
        noise of steps 1 to t adds up to; for a schedule, of its root mean square noise.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, score_budget=0,
        ...     num_examples=1000, batch_size=10, num_steps=3)
        >>> round(sum_noise(plan), 6) == round(2**0.5, 6)
        True
    """
    fresh = plan.gradient_noise_multipliers / strategies.length(plan.strategy)
    mean = float((fresh**2).mean() ** 0.5)
    return strategies.prefix_error(plan.strategy, plan.num_steps) * mean


def expected(plan: Any) -> float:
    """What a plan's bands leave of the noise of independent draws at its epsilon.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Returns:
        A ratio of `sum_noise`: below 1 the bands pay. The other plan has the same
        epsilon, batches and steps and constant noise where this one has it.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(epsilon=8.0, delta=1e-5, num_examples=60_000,
        ...     batch_size=600, num_steps=100, bands=4)
        >>> round(expected(plan), 2)
        0.64
    """
    if plan.bands == 1:
        return 1.0

    def scaled(by: float) -> Any:
        stages = tuple((count, z * float(by)) for count, z in plan.stages)
        return dataclasses.replace(plan, stages=stages, strategy=())

    alone = scaled(search.furthest_plan(scaled, plan.epsilon(), 1e6, 1e-3, whole=False))
    return sum_noise(plan) / sum_noise(alone)


def compared(
    make: Callable[..., Any], candidates: tuple[int, ...] = CANDIDATES
) -> list[Choice]:
    """What each number of bands leaves, for one budget.

    Args:
        make: the plan for a strategy, ``make(strategy=...)``.
        candidates: numbers of bands; those whose parts would be smaller than a batch
            are left out.

    Returns:
        One `Choice` for each, in the order given.

    Example:
        >>> import dp_ilg, functools
        >>> make = functools.partial(dp_ilg.plan_privacy, epsilon=8.0, delta=1e-5,
        ...     num_examples=60_000, batch_size=600, num_steps=100)
        >>> [(x.bands, round(x.relative, 2)) for x in compared(make, (1, 4))]
        [(1, 1.0), (4, 0.64)]
    """
    alone = make(strategy=())
    most = min(alone.num_examples // alone.batch_size, alone.num_steps)
    noise, found = sum_noise(alone), []
    for bands in candidates:
        if bands <= max(most, 1):
            strategy = strategies.optimal(bands, alone.num_steps)
            left = sum_noise(make(strategy=strategy)) if strategy else noise
            found.append(Choice(bands, strategy, left, left / noise if noise else 1.0))
    return found


def best(make: Callable[..., Any]) -> Choice:
    """The number of bands that leaves least noise; the smaller of two that are alike.

    Args:
        make: as in `compared`.

    Returns:
        The `Choice`; one band where no other gains a thousandth.

    Example:
        >>> import dp_ilg, functools
        >>> best(functools.partial(dp_ilg.plan_privacy, epsilon=1.0, delta=1e-5,
        ...     num_examples=800, batch_size=200, num_steps=20)).bands
        1
    """
    choices = compared(make)
    least = min(choice.relative for choice in choices)
    return next(choice for choice in choices if choice.relative <= least + 1e-3)


def with_strategy(asked: Any, plan_privacy: Callable[..., Any]) -> Any:
    """What a caller asked for, its number of bands as a strategy.

    Args:
        asked: a `dp_ilg.accounting.calibration.Calibration`.
        plan_privacy: makes a plan of its fields.

    Returns:
        The same with `strategy` set and without `bands`.

    Raises:
        ValueError: if both were given, or for a number of bands that is none.

    Example:
        >>> import dp_ilg
        >>> dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_examples=1000,
        ...     batch_size=10, num_steps=100, bands=2).bands
        2
    """
    if asked.bands is None:
        return asked
    if asked.strategy:
        raise ValueError(
            f"bands is {asked.bands!r} and strategy has {len(asked.strategy)} "
            "coefficients, but only one of them can be given; leave the other out."
        )
    template = asked.template()
    if isinstance(asked.bands, str):
        if asked.bands != "auto":
            raise ValueError(
                f"bands is {asked.bands!r}, but must be a whole number or 'auto'."
            )
        facts = dict(vars(asked), bands=None)
        del facts["strategy"]
        strategy = best(lambda strategy: plan_privacy(**facts, strategy=strategy))
        return dataclasses.replace(asked, bands=None, strategy=strategy.strategy)
    strategy = strategies.optimal(asked.bands, template.num_steps)
    return dataclasses.replace(asked, bands=None, strategy=strategy)
