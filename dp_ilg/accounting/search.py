"""The search of calibration: few exact evaluations, steered by a cheap estimate.

Noise, steps and batch size each have a safe end (much noise, one step) and an unsafe
one; epsilon grows from one to the other. The search walks towards the unsafe end and
only ever returns a number whose exact epsilon was seen to be within the target.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dp_ilg.accounting import accountants
from dp_ilg.accounting.plan import PrivacyPlan

_TOLERANCE = {False: 1e-3, True: 2e-4}  # of epsilon; by whether numbers are whole
_LEAST_EPSILON, _LARGEST_EPSILON = 1e-6, 10_000
_LEAST_DELTA = 1e-30  # that "pld" was held against an oracle for


def check_answerable(epsilon: Any, delta: Any, accountant: str) -> None:
    """Raises where no accountant, or not the one chosen, has a useful answer.

    Args:
        epsilon: the target; None if there is none.
        delta: the delta of the guarantee.
        accountant: a key of `accountants.ACCOUNTANTS`.

    Raises:
        ValueError: for an epsilon below 1e-6 or above 10,000, and for `"pld"` with a
            delta below 1e-30.

    Example:
        >>> check_answerable(1.0, 1e-40, "rdp")
        >>> check_answerable(1.0, 1e-40, "pld")
        Traceback (most recent call last):
        ValueError: delta is 1e-40, but the accountant 'pld' is checked down to 1e-30...
    """
    if epsilon is not None and epsilon > _LARGEST_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon}, which promises nothing; choose at most "
            f"{_LARGEST_EPSILON:,}, or noise_multiplier=0 for a run without privacy."
        )
    if epsilon is not None and epsilon < _LEAST_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon:g}, but accountants here resolve none below "
            f"{_LEAST_EPSILON:g}; choose a larger epsilon."
        )
    if accountant == "pld" and delta < _LEAST_DELTA:
        raise ValueError(
            f"delta is {delta:g}, but the accountant 'pld' is checked down to "
            f"{_LEAST_DELTA:g} only; choose a larger delta or accountant='rdp'."
        )


def furthest_within(
    target: float,
    exact: Callable[[float], float],
    rough: Callable[[float], float],
    safe: float,
    unsafe: float,
    *,
    whole: bool,
) -> float:
    """Returns the number nearest to `unsafe` at which epsilon is within the target.

    Args:
        target: the epsilon not to exceed.
        exact: epsilon at a number, monotone between `safe` and `unsafe`.
        rough: a cheap upper estimate of it.
        safe: the positive end where epsilon is smallest.
        unsafe: the positive end where it is largest.
        whole: whether only whole numbers are meant.

    Returns:
        The number; `unsafe` itself if even that is within the target.

    Raises:
        ValueError: if epsilon exceeds the target even at `safe`.

    Example:
        >>> furthest_within(2.0, lambda x: 3 / x, lambda x: 4 / x, 1e6, 1e-3,
        ...                 whole=False)
        1.500...
        >>> furthest_within(2.0, lambda x: x / 8, lambda x: x / 6, 1, 100, whole=True)
        16
    """
    if exact(safe) > target:
        raise ValueError(
            f"epsilon {target:g} cannot be reached: it is exceeded even with the most "
            f"private choice, {safe:g}; choose a larger epsilon or delta, or more "
            "noise."
        )
    if rough(unsafe) <= 3 * target and exact(unsafe) <= target:
        return unsafe
    aim = target * (1 - _TOLERANCE[whole] / 2)
    bracket = _Bracket(rough, aim, safe, unsafe, whole)
    for turn in range(60):
        if bracket.settled():
            break
        guess = bracket.guess(turn)
        value = exact(guess)
        bracket.learn(guess, value, is_safe=value <= target)
        if target * (1 - _TOLERANCE[whole]) <= value <= target:
            return guess
        if turn == 0 and value < target / 10 and exact(unsafe) <= target:
            return unsafe  # the estimate was far too pessimistic
    if bracket.unsafe == unsafe and exact(unsafe) <= target:
        return unsafe
    return bracket.safe


def furthest_plan(
    at: Callable[[float], PrivacyPlan],
    epsilon: Any,
    safe: float,
    unsafe: float,
    *,
    whole: bool,
) -> float:
    """Returns the number nearest to `unsafe` whose plan is within an epsilon.

    Args:
        at: the plan at a number.
        epsilon: not to be exceeded.
        safe: as in `furthest_within`.
        unsafe: as in `furthest_within`.
        whole: as in `furthest_within`.

    Returns:
        As `furthest_within`.

    Raises:
        ValueError: if epsilon is exceeded even at `safe`.

    Example:
        >>> plan = PrivacyPlan(
        ...     num_examples=100, batch_size=10, num_steps=3, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.0, stages=((3, 1.0),))
        >>> noise = lambda z: dataclasses.replace(plan, stages=((3, z),))
        >>> z = furthest_plan(noise, 1.0, 1e6, 1e-3, whole=False)
        >>> 0.99 < noise(z).epsilon() <= 1
        True
    """

    def rough(x: float) -> float:
        plan = at(x)
        return accountants.estimate(
            plan.event(),
            plan.accounted_delta,
            accountant=plan.accountant,
            neighboring_relation=plan.neighboring_relation,
        )

    exact = lambda x: at(x).epsilon()  # noqa: E731
    return furthest_within(float(epsilon), exact, rough, safe, unsafe, whole=whole)


@dataclasses.dataclass
class _Bracket:
    """A safe and an unsafe number, with epsilon at both once it is known."""

    rough: Callable[[float], float]
    aim: float
    safe: float
    unsafe: float
    whole: bool
    safe_epsilon: float = 0.0
    unsafe_epsilon: float = math.inf
    correction: float = 1.0

    def guess(self, turn: int) -> float:
        """Where to look next: the corrected estimate, then a straight line in logs.

        The middle if nothing was learnt, and every third turn after a while, so that
        the search always ends.
        """
        blind = turn > 0 and self.safe_epsilon == 0 and self.unsafe_epsilon == math.inf
        if blind or (turn > 6 and turn % 3 == 0):
            guess = math.sqrt(self.safe * self.unsafe)
        elif self.safe_epsilon > 0 and self.unsafe_epsilon < math.inf:
            guess = self._on_line()
        else:
            guess = self._by_estimate(self.aim / self.correction)
        return _inside(guess, self.safe, self.unsafe, self.whole)

    def learn(self, guess: float, value: float, *, is_safe: bool) -> None:
        """Moves one end of the bracket to a number whose epsilon is now known."""
        if is_safe:
            self.safe, self.safe_epsilon = guess, value
        else:
            self.unsafe, self.unsafe_epsilon = guess, value
        rough = self.rough(guess)
        if value > 0 and 0 < rough < math.inf:
            self.correction = value / rough

    def settled(self) -> bool:
        """Whether the two ends are as close as matters."""
        return _settled(self.safe, self.unsafe, self.whole)

    def _on_line(self) -> float:
        rise = math.log(self.unsafe_epsilon / self.safe_epsilon)
        share = math.log(self.aim / self.safe_epsilon) / rise
        return self.safe * (self.unsafe / self.safe) ** min(max(share, 0.0), 1.0)

    def _by_estimate(self, aim: float) -> float:
        safe, unsafe = self.safe, self.unsafe
        while not _settled(safe, unsafe, self.whole):
            middle = _inside(math.sqrt(safe * unsafe), safe, unsafe, self.whole)
            if self.rough(middle) <= aim:
                safe = middle
            else:
                unsafe = middle
        return safe


def _inside(guess: float, safe: float, unsafe: float, whole: bool) -> float:
    """Moves a guess a little off both ends of the bracket, so that it shrinks."""
    low, high = sorted((safe, unsafe))
    if whole:
        return min(max(round(guess), low + 1), high - 1)
    margin = (high / low) ** 1e-3
    return min(max(guess, low * margin), high / margin)


def _settled(safe: float, unsafe: float, whole: bool) -> bool:
    if whole:
        return abs(safe - unsafe) <= 1
    return max(safe, unsafe) / min(safe, unsafe) < 1 + 1e-5
