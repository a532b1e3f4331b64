"""What a plan promises to several records at once: pairs, families, households."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dp_ilg import validation
from dp_ilg.accounting import accountants


class GroupGuarantee(NamedTuple):
    """The guarantee of a group.

    Attributes:
        size: k, how many records may change together.
        epsilon: of the group.
        delta: of the group, as asked for.
        record_epsilon: of one record, of which epsilon is k times; at a delta small
            enough that the group's holds.
    """

    size: int
    epsilon: float
    delta: float
    record_epsilon: float


def group_guarantee(plan: Any, size: int, delta: float | None = None) -> GroupGuarantee:
    """The privacy of k units of a plan together.

    If each of k steps from one data set to another costs (epsilon, delta'), all cost
    (k epsilon, delta' (1 + e^epsilon + ... + e^((k - 1) epsilon))). The delta' of one
    unit is chosen so that this is smallest.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.
        size: k, at least 1.
        delta: of the group; None for the plan's.

    Returns:
        The guarantee; epsilon is infinite if none was found.

    Raises:
        ValueError: for a size that is no whole number, or a delta out of range.

    Privacy: an upper bound for any mechanism. For Gaussians without sampling the truth
    is smaller.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(epsilon=1.0, delta=1e-6, num_examples=60_000,
        ...     batch_size=600, num_steps=100)
        >>> pair = group_guarantee(plan, 2)
        >>> pair.size, 2 < pair.epsilon < 2.4
        (2, True)

    Reference: Vadhan, The Complexity of Differential Privacy, 2017, lemma 2.2.
    """
    validation.whole("size", size)
    wanted = plan.delta if delta is None else float(delta)
    validation.fraction("delta", wanted)
    if size == 1:
        return GroupGuarantee(1, _epsilon(plan, wanted), wanted, _epsilon(plan, wanted))
    low, high, best = math.log(wanted) - 60.0, math.log(wanted), math.inf
    for _ in range(30):  # bisection; whatever it finds is checked
        middle = (low + high) / 2
        found = _epsilon(plan, math.exp(middle))
        if found > 700 / size:  # a delta too small to have an epsilon
            low = middle
        elif _together(math.exp(middle), found, size) <= wanted:
            best, low = min(best, found), middle
        else:
            high = middle
    return GroupGuarantee(size, size * best, wanted, best)


def _epsilon(plan: Any, delta: float) -> float:
    """Of one unit at a delta, what the noise's law costs included."""
    paid = plan.noise_charge
    if delta <= paid.delta:
        return math.inf
    return paid.epsilon + accountants.epsilon(
        plan.event(),
        delta - paid.delta,
        accountant=plan.accountant,
        neighboring_relation=plan.neighboring_relation,
    )


def _together(delta: float, epsilon: float, size: int) -> float:
    return delta * sum(math.exp(j * epsilon) for j in range(size)) * (1 + 1e-12)
