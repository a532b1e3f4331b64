"""How far the noise drawn is from the Gaussian that is accounted, and the price.

The accountant's theorem is about a Gaussian rounded to the grid. A draw of
`dp_ilg.noise.steps` has another law, by very little:

- its density is off by a smooth factor, less than `SMOOTH` in the mean square: over N
  draws the likelihoods differ by at most a factor exp(t), but for a probability below
  exp(-150), with ``t = SMOOTH sqrt(300 N) + 2e-12 + 1.3e-25 N`` (Bernstein's
  inequality up to 10 standard deviations, a count of draws beyond; the last part is
  what the middle cells pay for the others);
- cells far out are rounded up, together by at most `EXCESS`;
- beyond 15.7 standard deviations too little is drawn, a probability below `BEYOND`.

So a mechanism that is (epsilon', delta')-private with Gaussians is, with these draws,
(epsilon' + 2 t, exp(t) delta' + N EXCESS + exp(60) (N BEYOND + exp(-150)))-private for
epsilon up to 60. docs/noise_law.md derives the constants; tests enumerate the law.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dp_ilg import validation

SMOOTH = 1e-20  # relative error of the density, mean square under the Gaussian
EXCESS = 4041 * 2.0**-96  # total rounding up of the table's cells
BEYOND = 1.2e-55  # probability of a Gaussian where the table does not reach
MOST_PARAMETERS = 10**9  # of a step, and of a prior release, unless a plan says less
MOST_DRAWS = 10**17  # of a run, for which the bounds above are derived
_EXPONENT = 150.0  # of the probability with which the factor exp(t) fails
_LARGEST_EPSILON = 60.0  # up to which that probability is paid for
_RARE = 2e-12  # logarithm of what the few draws beyond 10 deviations may add
_MIDDLE = 1.3e-25  # relative deficit of the middle cells
_EXACT_FACTOR = 1e-15  # epsilon for the grid of 2^-40 of exact draws, up to MOST_DRAWS
_EXACT_CUT = 4e-55  # probability of an exact draw beyond the 31 bits that hold it
_EXACT_EPSILON = 30.0  # up to which that is paid for, in a plan without a target
_SHARE = 0.01  # of delta, for a plan that does not say how large the model is
_LARGEST_SHARE = 0.5


class Charge(NamedTuple):
    """What is added to what the accountant says.

    Attributes:
        epsilon: added to epsilon.
        delta: taken from delta before the accountant sees it.
    """

    epsilon: float
    delta: float


def charge_of(draws: int, delta: float) -> Charge:
    """The price of so many draws.

    Args:
        draws: normal numbers drawn in the whole run.
        delta: the delta of the guarantee.

    Returns:
        The charge; nothing for no draws.

    Privacy: see the module; an upper bound for epsilon up to 60.

    Example:
        >>> found = charge_of(10**6 * 10**4, 1e-6)
        >>> found.epsilon < 1e-11, found.delta < 1e-9 * 1e-6
        (True, True)
    """
    if draws == 0:
        return Charge(0.0, 0.0)
    factor = SMOOTH * math.sqrt(2 * _EXPONENT * draws) + _RARE + _MIDDLE * draws
    missing = math.exp(_LARGEST_EPSILON) * (draws * BEYOND + math.exp(-_EXPONENT))
    return Charge(2 * factor, draws * EXCESS + missing + 1.01 * factor * delta)


def most_parameters(plan: Any) -> int:
    """How many coordinates a step of a plan may draw noise for.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Returns:
        Its `num_parameters`; where it has none, as many as 1 % of its delta pays for,
        and a billion at most. A billion, too, with exact noise.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=1000, batch_size=10, num_steps=100)
        >>> most_parameters(plan)
        1000000000
    """
    if plan.num_parameters is not None:
        return plan.num_parameters
    if plan.exact_noise:
        return MOST_PARAMETERS
    affordable = int(_SHARE * plan.delta / (1.01 * EXCESS))
    draws = min(affordable, MOST_DRAWS) - len(plan.prior_releases) * MOST_PARAMETERS
    return max(0, min(MOST_PARAMETERS, draws // plan.num_steps))


def charge(plan: Any) -> Charge:
    """What a plan pays for the law of its noise.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Returns:
        The charge. Exact draws pay 1e-15 of epsilon for their grid, and of delta the
        probability, below 4e-55, that one does not fit its 31 bits.

    Privacy: for at most `most_parameters` draws a step and a billion for each prior
    release.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=1000, batch_size=10, num_steps=100)
        >>> 0 < charge(plan).delta < 1e-3 * plan.delta
        True
    """
    if plan.exact_noise:
        least = _EXACT_EPSILON if plan.target_epsilon is None else plan.target_epsilon
        cut = _draws(plan) * _EXACT_CUT * math.exp(min(least, _LARGEST_EPSILON))
        return Charge(_EXACT_FACTOR, cut)
    return charge_of(_draws(plan), plan.delta)


def check(plan: Any) -> None:
    """Raises unless the plan can pay for its noise.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Raises:
        ValueError: for a number of parameters that is none, or whose draws would take
            half of delta.

    Example:
        >>> import dp_ilg
        >>> dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-18, num_examples=1000,
        ...     batch_size=10, num_steps=100, num_parameters=10**6)
        Traceback (most recent call last):
        ValueError: num_parameters is 1,000,000 ...
    """
    if not isinstance(plan.exact_noise, bool):
        raise ValueError(f"exact_noise is {plan.exact_noise!r}, but must be a bool.")
    if plan.num_parameters is not None:
        validation.whole("num_parameters", plan.num_parameters)
    given = plan.exact_noise or plan.num_parameters is None
    paid = charge(plan).delta if given or _draws(plan) <= MOST_DRAWS else math.inf
    if paid > _LARGEST_SHARE * plan.delta:
        raise ValueError(
            f"num_parameters is {most_parameters(plan):,} for {plan.num_steps:,} steps,"
            f" whose noise costs {paid:.1g} of the delta of {plan.delta:g}; choose a "
            "larger delta, fewer parameters or exact_noise=True."
        )


def _draws(plan: Any) -> int:
    """Of the run and, a billion each, of the releases before it."""
    prior = (
        0
        if plan.num_parameters is None and most_parameters(plan) == 0
        else (len(plan.prior_releases) * MOST_PARAMETERS)
    )
    return most_parameters(plan) * plan.num_steps + prior
