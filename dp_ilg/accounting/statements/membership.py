"""A yardstick for epsilon: what a guess at one's membership can become.

Somebody knows every example but one, and that one too, and holds it for even odds
whether it was used. How often can he be right, having seen all that a run releases?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from dp_ilg.accounting.accountants import NEIGHBORING_RELATIONS
from dp_ilg.accounting.certified import contour, moments
from dp_ilg.accounting.certified.runs import CUT, Run
from dp_ilg.accounting.kinds import Kind, kinds_of, merged

_TILTS = (1.0, 0.3, 0.1, 0.03)  # lines that are tried, until one is near the guess
_IMAGINED = 3e-3  # of the squared distance, that the imagined release may add
_MOST_KINDS = 2048


def right_guesses(epsilon: float, delta: float) -> float:
    """How often a coin toss can become right under any (epsilon, delta) guarantee.

    Args:
        epsilon: of the guarantee; infinite for none.
        delta: of the guarantee.

    Returns:
        ``(exp(epsilon) + delta) / (1 + exp(epsilon))``, between 0.5 and 1. With delta
        0 it also bounds how certain one result can make him.

    Privacy:
        An upper bound over all ways to guess from all that was released, for somebody
        who knows everything else. Both cases are equally likely beforehand.

    Example:
        >>> right_guesses(0.0, 0.0), round(right_guesses(2.0, 1e-5), 3)
        (0.5, 0.881)

    Reference: Kairouz, Oh and Viswanath 2015, Theorem 2.1: the errors of any test have
    ``FP + exp(epsilon) FN >= 1 - delta`` and the same with FP and FN exchanged.
    """
    return 1 - (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))


def right_guesses_of(plan: Any, steps: SupportsIndex | None = None) -> float:
    """How often a coin toss can become right by what a plan releases.

    Half of 1 plus the total variation distance of what is released with and without
    the example, the exact value but for a thousandth of that distance in most plans. It
    is far below what one epsilon and delta allow, which a worse mechanism could have.

    Args:
        plan: a `dp_ilg.PrivacyPlan`.
        steps: the number of steps taken; None for all.

    Returns:
        A share between 0.5 (a guess is as good) and 1 (he can know).

    Raises:
        ValueError: for a number of steps that the plan has not.

    Privacy:
        An upper bound as `right_guesses`, whatever the plan's accountant, with the
        noise's law included; a number made of public facts. For the relation
        ``"replace_one"`` he guesses which of two examples it was.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=60_000,
        ...     batch_size=1024, num_steps=600)
        >>> round(right_guesses_of(plan), 3), round(right_guesses(2.0, 1e-5), 3)
        (0.588, 0.881)

    Reference: Dong, Roth and Su 2022 (trade-off functions); `contour` for the sum.
    """
    claimed, paid = plan.epsilon(steps), plan.noise_charge
    found = right_guesses(claimed, plan.delta)
    if claimed == 0 or math.isinf(claimed):
        return found
    moved = NEIGHBORING_RELATIONS[plan.neighboring_relation]
    about = _gaussian_distance(claimed, plan.delta)
    distance = _distance(kinds_of(plan.event(steps)), moved, about) + paid.delta
    return min(found, right_guesses(paid.epsilon, min(1.0, distance)))


def _distance(kinds: Sequence[Kind], sensitivity: int, about: float) -> float:
    """A bound on the total variation distance, which is delta at an epsilon of 0."""
    kinds = merged(kinds, _MOST_KINDS)
    cut = sensitivity == 1 and any(kind.truncated for kind in kinds)
    runs = [Run.of(kinds, sensitivity, True, law) for law in ((0, 1) if cut else (0,))]
    return max(_distance_of(run, about) for run in runs)


def _distance_of(run: Run, about: float) -> float:
    if not run.parts:
        return _normal_distance(math.sqrt(run.normal))
    run, found = run.cut(math.log(about), 1.0), 1.0
    for tilt in _TILTS:
        added = _IMAGINED * math.pi * about * (1 + tilt)
        line = contour.fitted(run, tilt, math.log(about), about, added)
        terms = line and contour.summed(run, line)
        if terms:
            found = min(found, _sum_at_zero(terms) + CUT * about)
        if found < 1.05 * about:
            break
    return found


def _sum_at_zero(terms: contour.Terms) -> float:
    """The sum of `contour` at an epsilon of 0, which is never below delta there."""
    frequencies = 2 * math.pi / terms.line.period * np.arange(len(terms.values))
    turned: Any = terms.values * np.exp(1j * frequencies * terms.mean)
    total = float(np.sum(turned.real)) + terms.error
    log_sum = math.log(total) + terms.log_scale
    return math.exp(min(log_sum + 4 * moments.UNIT * abs(terms.log_scale), 1.0))


def _normal_distance(mu: float) -> float:
    """The total variation distance of two normal variables, mu deviations apart."""
    return math.erf(mu / math.sqrt(8))


def _gaussian_distance(epsilon: float, delta: float) -> float:
    """That of the Gaussian with this epsilon and delta; long runs are near to one."""
    from scipy import optimize, special

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        far = special.log_ndtr(-epsilon / mu - mu / 2)
        return special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + far) - delta

    log_mu: Any = optimize.brentq(excess, -14.0, 7.0, xtol=1e-3)
    return _normal_distance(math.exp(log_mu))
