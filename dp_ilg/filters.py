"""A privacy filter: one budget for stages that are chosen along the way.

An ordinary plan is fixed before the first step. Whoever chooses the noise, the batch
size or the number of the next steps by what earlier steps *released* trains in stages,
each with a plan of its own; a filter adds up what they cost and refuses the one that
would go beyond the budget. Privacy losses of stages chosen that way do not compose as
those of a fixed plan do, but Renyi divergences at one order, fixed beforehand, add up
all the same. That it is one order, not the whole distribution, is what it costs.
"""

from __future__ import annotations

import math
from typing import Any

from dp_ilg import accounting, renyi, validation
from dp_ilg.calibration import plan_privacy
from dp_ilg.plan import PrivacyPlan

_ORDERS = (
    *(1 + 0.1 * k for k in range(1, 40)),
    *(5 + 0.5 * k for k in range(50)),
    *(30.0 * 1.1**k for k in range(60)),
)
_ROUNDING = 1e-9  # of every charge, so that sums of rounded numbers stay bounds
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e5
_HALVINGS = 60


class FilterExhausted(ValueError):
    """A stage would cost more than is left of the budget."""


class PrivacyFilter:
    """A budget that admits stages of training one after the other.

    Args:
        epsilon: the whole budget.
        planned: roughly what will be done, made before the data is touched. Its delta
            and neighboring relation are the filter's, and at the Renyi order where it
            fits the budget best everything will be counted; nothing else binds.

    Attributes:
        epsilon: of the guarantee.
        delta: of the guarantee.
        neighboring_relation: of the guarantee.
        order: the Renyi order that is counted.
        budget: the divergence at that order that makes up (epsilon, delta).
        spent: the divergence of the stages admitted so far, at most `budget`.

    Raises:
        TypeError: for a `planned` that is no plan.
        ValueError: for an epsilon that is no finite number above 0, or for which no
            order leaves a budget.

    Privacy:
        All stages together are (epsilon, delta)-DP, if each was admitted before its
        first step, was chosen from public facts and earlier releases only, draws
        batches and noise under keys of its own, and keeps to its plan. A stage counts
        as a whole from when it is admitted. Losses, norms and counts of a stage are no
        releases. To go on after a crash, admit the same stages to a new filter first.

    Example:
        >>> import dp_ilg
        >>> facts = dict(num_examples=60_000, batch_size=600)
        >>> planned = dp_ilg.plan_privacy(
        ...     epsilon=1.0, delta=1e-5, num_steps=300, **facts)
        >>> budget = PrivacyFilter(1.0, planned)
        >>> first = budget.stage(0.25, num_steps=75, **facts)
        >>> budget.admit(first)  # then take its 75 steps
        >>> round(budget.left / budget.budget, 3)
        0.75
        >>> budget.admit(planned)
        Traceback (most recent call last):
        dp_ilg.filters.FilterExhausted: The stage costs ... times the budget of ...

    Reference: Feldman and Zrnic, "Individual Privacy Accounting via a Renyi Filter",
    NeurIPS 2021 (the filter); Rogers, Roth, Ullman and Vadhan 2016 (the notion).
    """

    def __init__(self, epsilon: Any, planned: Any):
        """Fixes budget and order."""
        validation.positive("epsilon", epsilon)
        _check_plan("planned", planned)
        self.epsilon, self.delta = float(epsilon), planned.delta
        self.neighboring_relation = planned.neighboring_relation
        self.order = self._best_order(planned)
        self.budget = _budget(self.epsilon, self.delta, self.order)
        self.spent = 0.0

    @property
    def left(self) -> float:
        """The divergence that further stages may have, at least 0."""
        return max(0.0, self.budget - self.spent)

    def cost(self, plan: Any) -> float:
        """Returns the divergence of a stage at the filter's order.

        Args:
            plan: of the stage, prior releases included.

        Returns:
            At least 0; infinite without noise.

        Raises:
            TypeError: for anything but a plan.
            ValueError: for a plan with another neighboring relation.
        """
        _check_plan("plan", plan)
        if plan.neighboring_relation != self.neighboring_relation:
            raise ValueError(
                f"The stage is planned for {plan.neighboring_relation!r}, but the "
                f"filter for {self.neighboring_relation!r}; use one of them for both."
            )
        return self._divergence(plan, self.order)

    def admit(self, plan: Any) -> None:
        """Charges a stage, before its first step, or refuses it.

        Args:
            plan: of the stage.

        Raises:
            FilterExhausted: where it costs more than is left; nothing is charged then.
            TypeError: for anything but a plan.
            ValueError: for a plan with another neighboring relation.
        """
        cost = self.cost(plan)
        if not self.spent + cost <= self.budget:
            raise FilterExhausted(
                f"The stage costs {cost / self.budget:.3g} times the budget of epsilon "
                f"{self.epsilon:g}, of which {self.left / self.budget:.3g} is left; "
                "give it more noise or fewer steps."
            )
        self.spent += cost

    def stage(self, share: Any, **facts: Any) -> PrivacyPlan:
        """Plans a stage that costs a share of the whole budget.

        Args:
            share: of the budget, in (0, 1]; more than is left means all that is left.
            **facts: num_examples, batch_size, num_steps and other arguments of
                `dp_ilg.plan_privacy`, but neither epsilon, noise nor delta.

        Returns:
            The plan with the smallest noise that costs no more; not yet admitted.

        Raises:
            FilterExhausted: where nothing is left, or too little for these steps.
            TypeError: for arguments that are the filter's own.
            ValueError: as `dp_ilg.plan_privacy`.
        """
        if share != 1:
            validation.fraction("share", share)
        own: dict[str, Any] = dict(
            delta=self.delta, neighboring_relation=self.neighboring_relation
        )
        for name in ("epsilon", "noise_multiplier", *own):
            if name in facts:
                raise TypeError(
                    f"stage() got {name}, which the filter decides; leave it out."
                )
        wanted = min(float(share) * self.budget, self.left)

        def at(noise_multiplier: float) -> PrivacyPlan:
            return plan_privacy(noise_multiplier=noise_multiplier, **own, **facts)

        low, high = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
        if not self.cost(at(math.exp(high))) <= wanted:
            raise FilterExhausted(
                f"Of the budget of epsilon {self.epsilon:g}, {self.left:.3g} of "
                f"{self.budget:.3g} is left, too little for these steps; take fewer."
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = self.cost(at(math.exp(middle))) <= wanted
            low, high = (low, middle) if within else (middle, high)
        return at(math.exp(high))

    def _best_order(self, planned: PrivacyPlan) -> float:
        """Where the planned steps take the smallest part of the budget."""
        budgets = {a: _budget(self.epsilon, self.delta, a) for a in _ORDERS}
        parts = {
            a: self._divergence(planned, a) / budget
            for a, budget in budgets.items()
            if budget > 0
        }
        if not parts:
            raise ValueError(
                f"epsilon is {self.epsilon:g} at delta {self.delta:g}, too small for "
                "Renyi divergences to leave a budget; choose a larger one."
            )
        return min(parts, key=lambda order: parts[order])

    def _divergence(self, plan: PrivacyPlan, order: float) -> float:
        kinds = accounting.kinds_of(plan.event())
        if any(kind.noise_multiplier == 0 for kind in kinds):
            return math.inf
        moved = accounting.NEIGHBORING_RELATIONS[self.neighboring_relation]
        found = renyi.run_divergences(kinds, (order,), moved)
        return float(found[0]) * (1 + _ROUNDING)


def _budget(epsilon: float, delta: float, order: float) -> float:
    """The divergence that makes up (epsilon, delta) at an order.

    Proposition 12 of Canonne, Kamath and Steinke 2020, solved for the divergence.
    """
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def _check_plan(name: str, plan: Any) -> None:
    if not isinstance(plan, PrivacyPlan):
        raise TypeError(
            f"{name} is {type(plan).__name__}, but must be a PrivacyPlan; make one "
            "with dp_ilg.plan_privacy."
        )
