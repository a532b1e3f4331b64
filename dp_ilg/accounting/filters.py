"""A privacy filter: one budget for stages that are chosen along the way.

An ordinary plan is fixed before the first step. Whoever chooses the noise, the batch
size or the number of the next steps by what earlier steps *released* trains in stages,
each with a plan of its own; a filter adds up what they cost and refuses the one that
would go beyond the budget. Privacy losses of stages chosen that way do not compose as
those of a fixed plan do, but Renyi divergences at one order, fixed beforehand, add up
all the same. That it is one order, not the whole distribution, is what it costs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, NoReturn

from dp_ilg import validation
from dp_ilg.accounting import accountants, renyi
from dp_ilg.accounting.calibration import plan_privacy
from dp_ilg.accounting.kinds import kinds_of
from dp_ilg.accounting.plan import PrivacyPlan

_ORDERS = (
    *(1 + 0.1 * k for k in range(1, 40)),
    *(5 + 0.5 * k for k in range(50)),
    *(30.0 * 1.1**k for k in range(60)),
)
# of every charge, and of the logarithm of every step's moment, so that sums of rounded
# numbers stay bounds
_ROUNDING, _STEP_ROUNDING = 1e-9, 1e-14
_NO_NOISE = 1e-6  # below it an epsilon is beyond any use: call it infinite
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e5
_HALVINGS = 60
_OWN = ("epsilon", "noise_multiplier", "delta", "neighboring_relation", "num_examples")


class FilterExhausted(ValueError):
    """A stage would cost more than is left of the budget."""


class PrivacyFilter:
    """A budget that admits stages of training one after the other.

    Args:
        epsilon: the whole budget.
        planned: roughly what will be done, made before the data is touched. Its delta
            neighboring relation and number of examples are the filter's, and at the
            Renyi order where it fits the budget best everything will be counted;
            nothing else binds.

    Attributes:
        epsilon: of the guarantee.
        delta: of the guarantee.
        neighboring_relation: of the guarantee.
        num_examples: of the one set of examples that all stages draw from.
        order: the Renyi order that is counted.
        budget: the divergence at that order that makes up (epsilon, delta).
        spent: the divergence of the stages admitted so far, at most `budget`.

    Raises:
        TypeError: for a `planned` that is no plan, and whenever a filter is copied: two
            would spend one budget twice.
        ValueError: for an epsilon that is no finite number above 0, or for which no
            order leaves a budget, and for a `planned` without noise.

    Privacy:
        All stages together are (epsilon, delta)-DP, if each was admitted before its
        first step, was chosen from public facts and earlier releases only, draws
        batches and noise under keys of its own, and keeps to its plan. A stage counts
        as a whole from when it is admitted; whoever stops early has spent no less than
        epsilon. Losses, norms and counts of a stage are no releases, and the statement
        of a stage's plan speaks of that stage alone. To go on after a crash, make the
        filter with the same epsilon and `planned` and admit the same stages first.

    Example:
        >>> import dp_ilg
        >>> planned = dp_ilg.plan_privacy(
        ...     epsilon=1.0, delta=1e-5, num_examples=60_000, batch_size=600,
        ...     num_steps=300)
        >>> budget = PrivacyFilter(1.0, planned)
        >>> first = budget.stage(0.25, batch_size=600, num_steps=75)
        >>> budget.admit(first)  # then take its 75 steps
        >>> round(budget.left / budget.budget, 3)
        0.75
        >>> budget.admit(planned)
        Traceback (most recent call last):
        dp_ilg.accounting.filters.FilterExhausted: The stage costs ... times the ...

    Reference: Feldman and Zrnic, "Individual Privacy Accounting via a Renyi Filter",
    NeurIPS 2021 (the filter); Rogers, Roth, Ullman and Vadhan 2016 (the notion).
    """

    def __init__(self, epsilon: Any, planned: Any):
        """Fixes budget and order."""
        validation.positive("epsilon", epsilon)
        _check_plan("planned", planned)
        self.epsilon, self.delta = float(epsilon), planned.delta
        paid = planned.noise_charge.epsilon  # for the law of the noise, and in delta
        self._accounted = (self.epsilon - paid, planned.accounted_delta)
        self.neighboring_relation = planned.neighboring_relation
        self.num_examples = planned.num_examples
        self.order = self._best_order(planned)
        self.budget = _budget(*self._accounted, self.order)
        self._spent = 0.0

    def __reduce__(self) -> NoReturn:
        """Refuses copies."""
        raise TypeError(
            f"A {type(self).__name__} cannot be copied, since two would spend one "
            "budget twice; make a new one and admit the same stages."
        )

    def __repr__(self) -> str:
        """What is left, in public numbers."""
        return (
            f"{type(self).__name__}(epsilon={self.epsilon:g}, delta={self.delta:g}, "
            f"order={self.order:g}, left={self.left:.4g} of {self.budget:.4g})"
        )

    @property
    def spent(self) -> float:
        """The divergence of the stages admitted so far."""
        return self._spent

    @property
    def left(self) -> float:
        """The divergence that further stages may have, at least 0."""
        return max(0.0, self.budget - self._spent)

    def cost(self, plan: Any) -> float:
        """Returns the divergence of a stage at the filter's order.

        Args:
            plan: of the stage, prior releases included.

        Returns:
            At least 0; infinite without noise.

        Raises:
            TypeError: for anything but a plan.
            ValueError: for a plan with another neighboring relation, or for another
                number of examples.
        """
        _check_plan("plan", plan)
        for name in ("neighboring_relation", "num_examples"):
            asked, own = getattr(plan, name), getattr(self, name)
            if asked != own:
                raise ValueError(
                    f"The stage is planned for {name} {asked!r}, but the filter for "
                    f"{own!r}; use one of them for both."
                )
        return self._divergence(plan, self.order)

    def admit(self, plan: Any) -> None:
        """Charges a stage, before its first step, or refuses it.

        Args:
            plan: of the stage.

        Raises:
            FilterExhausted: where it costs more than is left; nothing is charged then.
            TypeError: for anything but a plan.
            ValueError: as `cost`.
        """
        cost = self.cost(plan)
        if not cost <= self.left:
            raise FilterExhausted(
                f"The stage costs {cost / self.budget:.3g} times the budget of epsilon "
                f"{self.epsilon:g}, of which {self.left / self.budget:.3g} is left; "
                "give it more noise or fewer steps."
            )
        self._spent += cost

    def stage(self, share: Any, **facts: Any) -> PrivacyPlan:
        """Plans a stage that costs a share of the whole budget.

        Args:
            share: of the budget, in (0, 1]; more than is left means all that is left.
            **facts: batch_size, num_steps and other arguments of
                `dp_ilg.plan_privacy`, but nothing that is the filter's own.

        Returns:
            The plan with the smallest noise that costs no more; not yet admitted.

        Raises:
            FilterExhausted: where that is too little for these steps.
            TypeError: for an argument that is missing, unknown or the filter's own.
            ValueError: as `dp_ilg.plan_privacy`, and for a share outside (0, 1].
        """
        validation.positive("share", share)
        if share > 1:
            raise ValueError(f"share is {share}, but must be at most 1.")
        _check_facts(facts)
        wanted = min(float(share) * self.budget, self.left)
        own: dict[str, Any] = {name: getattr(self, name) for name in _OWN[2:]}
        unit = plan_privacy(noise_multiplier=1.0, **own, **facts)

        def at(log_noise: float) -> PrivacyPlan:
            scaled = ((count, z * math.exp(log_noise)) for count, z in unit.stages)
            return dataclasses.replace(unit, stages=tuple(scaled))

        low, high = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
        if not self.cost(at(high)) <= wanted:
            raise FilterExhausted(self._too_little(wanted, unit))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = self.cost(at(middle)) <= wanted
            low, high = (low, middle) if within else (middle, high)
        return at(high)

    def _too_little(self, wanted: float, plan: PrivacyPlan) -> str:
        names = "".join(
            f" and the release of {name}" for name, _ in plan.prior_releases
        )
        return (
            f"The stage may cost {wanted / self.budget:.3g} times the budget of "
            f"epsilon {self.epsilon:g}, too little for {plan.num_steps} steps{names}; "
            "take a larger share, if there is any, or release less."
        )

    def _best_order(self, planned: PrivacyPlan) -> float:
        """Where the planned steps take the smallest part of the budget."""
        budgets = {a: _budget(*self._accounted, a) for a in _ORDERS}
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
        best = min(parts, key=lambda order: parts[order])
        if parts[best] == math.inf:
            raise ValueError(
                "planned has steps with hardly any noise, which no order makes private;"
                " plan steps of about the budget."
            )
        return best

    def _divergence(self, plan: PrivacyPlan, order: float) -> float:
        kinds = kinds_of(plan.event())
        if any(kind.noise_multiplier < _NO_NOISE for kind in kinds):
            return math.inf
        moved = accountants.NEIGHBORING_RELATIONS[self.neighboring_relation]
        found = float(renyi.run_divergences(kinds, (order,), moved)[0])
        steps = sum(kind.count for kind in kinds)
        return found * (1 + _ROUNDING) + steps * _STEP_ROUNDING / (order - 1)


def _budget(epsilon: float, delta: float, order: float) -> float:
    """The divergence that makes up (epsilon, delta) at an order.

    Proposition 12 of Canonne, Kamath and Steinke 2020, solved for the divergence.
    """
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def _check_facts(facts: dict[str, Any]) -> None:
    parameters = inspect.signature(plan_privacy).parameters
    for name in facts:
        if name in _OWN:
            raise TypeError(f"stage got {name}, which is the filter's; leave it out.")
        if name not in parameters:
            known = ", ".join(key for key in parameters if key not in _OWN)
            raise TypeError(f"stage got {name}, which is unknown; it takes {known}.")
    if not {"num_steps", "num_epochs"} & set(facts):
        raise TypeError("stage lacks num_steps; give it, or num_epochs.")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and name not in _OWN
        if needed and name not in facts:
            raise TypeError(f"stage lacks {name}; give it.")


def _check_plan(name: str, plan: Any) -> None:
    if not isinstance(plan, PrivacyPlan):
        raise TypeError(
            f"{name} is {type(plan).__name__}, but must be a PrivacyPlan; make one "
            "with dp_ilg.plan_privacy."
        )
