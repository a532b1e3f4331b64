"""Calibration: the noise, the steps or the batch size that an epsilon allows.

Epsilon is monotone in each of them, so a cheap Renyi bound finds the neighbourhood and
few evaluations of the chosen accountant settle it. What is returned never exceeds the
target.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np

from dp_ilg import accounting, validation
from dp_ilg import schedules as schedules_lib
from dp_ilg.plan import PrivacyPlan

_CONSTANT = schedules_lib.constant()
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6
_MOST_STEPS = 1_000_000


def plan_privacy(
    *,
    epsilon: SupportsFloat | None = None,
    noise_multiplier: SupportsFloat | None = None,
    delta: SupportsFloat,
    num_examples: SupportsIndex,
    batch_size: SupportsIndex,
    num_steps: SupportsIndex,
    schedule: Any = _CONSTANT,
    score_budget: SupportsFloat = 0.01,
    l2_clip_norm: SupportsFloat = 1.0,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    num_stages: SupportsIndex = 16,
) -> PrivacyPlan:
    """Plans a run: finds the noise for a target epsilon, or takes it as given.

    The whole schedule is scaled. It is made piecewise constant on at most
    `num_stages` stages first, so the plan's multipliers are exactly those accounted.

    Args:
        epsilon: the target; the plan's epsilon is at most it and within 0.5 % of it.
        noise_multiplier: instead of `epsilon`, the scale of the schedule: the
            effective multiplier z where the schedule is 1. With 0 there is no privacy,
            and the plan's statement says so.
        delta: the delta of the guarantee, best below 1 / num_examples.
        num_examples: the number of training examples.
        batch_size: the expected batch size.
        num_steps: the number of steps.
        schedule: the shape of the noise over the steps, from `dp_ilg.schedules`.
        score_budget: the share of each step's budget for layer scores, in [0, 1).
        l2_clip_norm: the bound of one example's gradient.
        accountant: ``"pld"`` (tightest), ``"rdp"`` or ``"zcdp"``.
        neighboring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.
        num_stages: the largest number of distinct multipliers; accounting time grows
            with it.

    Returns:
        The plan.

    Raises:
        ValueError: for any value that makes no valid plan, unless exactly one of
            `epsilon` and `noise_multiplier` is given, or if the target cannot be
            reached.

    Privacy:
        Holds for the relation named and batches drawn by Poisson sampling. These
        arguments must not depend on the data.

    Example:
        >>> plan = plan_privacy(epsilon=2.0, delta=1e-5, num_examples=60_000,
        ...                     batch_size=1024, num_steps=600)
        >>> 1.99 < plan.epsilon() <= 2.0
        True
        >>> round(float(plan.noise_multipliers[0]), 2)
        1.13
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            f"epsilon is {epsilon!r} and noise_multiplier is {noise_multiplier!r}, but "
            "exactly one of them must be given."
        )
    plan = _template(
        num_examples=num_examples,
        batch_size=batch_size,
        num_steps=num_steps,
        delta=delta,
        l2_clip_norm=l2_clip_norm,
        score_budget=score_budget,
        accountant=accountant,
        neighboring_relation=neighboring_relation,
        target_epsilon=epsilon,
    )
    plan = _with_shape(plan, schedule, num_stages)
    if epsilon is None:
        return _scaled(plan, _noise(noise_multiplier))
    scale = _solve(
        lambda x: _scaled(plan, x), epsilon, _MOST_NOISE, _LEAST_NOISE, whole=False
    )
    if scale == _LEAST_NOISE:
        raise ValueError(
            f"epsilon {epsilon} at delta {delta} needs a noise multiplier below "
            f"{_LEAST_NOISE}, which protects nobody; choose a smaller epsilon or delta."
        )
    return _scaled(plan, scale)


def steps_for_epsilon(
    *,
    epsilon: SupportsFloat,
    noise_multiplier: SupportsFloat,
    delta: SupportsFloat,
    num_examples: SupportsIndex,
    batch_size: SupportsIndex,
    schedule: Any = _CONSTANT,
    score_budget: SupportsFloat = 0.01,
    l2_clip_norm: SupportsFloat = 1.0,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    num_stages: SupportsIndex = 16,
) -> PrivacyPlan:
    """Plans the longest run that a target epsilon allows at a given noise.

    Args:
        epsilon: the target; the plan's epsilon is at most it.
        noise_multiplier: the scale of the schedule, above 0.
        delta: as in `plan_privacy`.
        num_examples: as in `plan_privacy`.
        batch_size: as in `plan_privacy`.
        schedule: as in `plan_privacy`; stretched to the number of steps.
        score_budget: as in `plan_privacy`.
        l2_clip_norm: as in `plan_privacy`.
        accountant: as in `plan_privacy`.
        neighboring_relation: as in `plan_privacy`.
        num_stages: as in `plan_privacy`.

    Returns:
        The plan; its `num_steps` is the answer, to about 0.1 %.

    Raises:
        ValueError: as `plan_privacy`, or if not even one step is possible or more
            than a million are.

    Privacy:
        As for `plan_privacy`.

    Example:
        >>> plan = steps_for_epsilon(epsilon=2.0, noise_multiplier=1.1, delta=1e-5,
        ...                          num_examples=60_000, batch_size=1024)
        >>> 500 < plan.num_steps < 600
        True
    """
    validation.positive("epsilon", epsilon)
    validation.positive("noise_multiplier", noise_multiplier)
    template = _template(
        num_examples=num_examples,
        batch_size=batch_size,
        num_steps=1,
        delta=delta,
        l2_clip_norm=l2_clip_norm,
        score_budget=score_budget,
        accountant=accountant,
        neighboring_relation=neighboring_relation,
        target_epsilon=epsilon,
    )

    def at(steps: float) -> PrivacyPlan:
        plan = dataclasses.replace(
            template, num_steps=int(steps), stages=((int(steps), 1.0),)
        )
        return _scaled(_with_shape(plan, schedule, num_stages), noise_multiplier)

    steps = _solve(at, epsilon, 1, _MOST_STEPS, whole=True)
    if steps == _MOST_STEPS:
        raise ValueError(
            f"epsilon {epsilon} allows more than {_MOST_STEPS:,} steps; use less noise "
            "or a larger batch."
        )
    return at(steps)


def batch_size_for_epsilon(
    *,
    epsilon: SupportsFloat,
    noise_multiplier: SupportsFloat,
    delta: SupportsFloat,
    num_examples: SupportsIndex,
    num_steps: SupportsIndex,
    schedule: Any = _CONSTANT,
    score_budget: SupportsFloat = 0.01,
    l2_clip_norm: SupportsFloat = 1.0,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    num_stages: SupportsIndex = 16,
) -> PrivacyPlan:
    """Plans the largest expected batch that a target epsilon allows at a given noise.

    Args:
        epsilon: the target; the plan's epsilon is at most it.
        noise_multiplier: the scale of the schedule, above 0.
        delta: as in `plan_privacy`.
        num_examples: as in `plan_privacy`.
        num_steps: as in `plan_privacy`.
        schedule: as in `plan_privacy`.
        score_budget: as in `plan_privacy`.
        l2_clip_norm: as in `plan_privacy`.
        accountant: as in `plan_privacy`; zCDP knows no sampling, so with it any batch
            is possible or none.
        neighboring_relation: as in `plan_privacy`.
        num_stages: as in `plan_privacy`.

    Returns:
        The plan; its `batch_size` is the answer, to about 0.1 %, at most
        `num_examples`.

    Raises:
        ValueError: as `plan_privacy`, or if not even an expected size of 1 is possible.

    Privacy:
        As for `plan_privacy`.

    Example:
        >>> plan = batch_size_for_epsilon(epsilon=2.0, noise_multiplier=1.1, delta=1e-5,
        ...                               num_examples=60_000, num_steps=600)
        >>> 950 < plan.batch_size < 1024
        True
    """
    validation.positive("epsilon", epsilon)
    validation.positive("noise_multiplier", noise_multiplier)
    template = _template(
        num_examples=num_examples,
        batch_size=1,
        num_steps=num_steps,
        delta=delta,
        l2_clip_norm=l2_clip_norm,
        score_budget=score_budget,
        accountant=accountant,
        neighboring_relation=neighboring_relation,
        target_epsilon=epsilon,
    )

    def at(batch_size: float) -> PrivacyPlan:
        plan = dataclasses.replace(template, batch_size=int(batch_size))
        return _scaled(_with_shape(plan, schedule, num_stages), noise_multiplier)

    return at(_solve(at, epsilon, 1, template.num_examples, whole=True))


def _template(**facts: Any) -> PrivacyPlan:
    """A plan with noise 1 throughout, which checks every fact; warns of the delta."""
    plan = PrivacyPlan(stages=((facts["num_steps"], 1.0),), **facts)
    if plan.delta > 1 / plan.num_examples:
        warnings.warn(
            f"delta is {plan.delta:g}, above 1 / num_examples = "
            f"{1 / plan.num_examples:.3g}, so publishing one example drawn at random "
            "would satisfy the guarantee; choose a smaller delta.",
            UserWarning,
            stacklevel=3,
        )
    return plan


def _with_shape(plan: PrivacyPlan, schedule: Any, num_stages: Any) -> PrivacyPlan:
    if not callable(getattr(schedule, "multipliers", None)):
        raise ValueError(
            f"schedule is {schedule!r}, but must be made by dp_ilg.schedules: one of "
            f"{', '.join(schedules_lib.SCHEDULES)}."
        )
    values = schedule.multipliers(plan.num_steps, 1 / plan.sampling_prob)
    values = np.asarray(values, np.float64)
    if values.shape != (plan.num_steps,):
        raise ValueError(
            f"The schedule gives an array of shape {values.shape}, but the plan has "
            f"{plan.num_steps} steps; give one multiplier a step."
        )
    if not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(
            "The schedule gives a multiplier that is not a finite number above 0; "
            "give only such."
        )
    return dataclasses.replace(plan, stages=schedules_lib.to_stages(values, num_stages))


def _scaled(plan: PrivacyPlan, scale: Any) -> PrivacyPlan:
    stages = tuple((count, z * float(scale)) for count, z in plan.stages)
    return dataclasses.replace(plan, stages=stages)


def _noise(noise_multiplier: Any) -> float:
    if noise_multiplier != 0:
        validation.positive("noise_multiplier", noise_multiplier)
    return float(noise_multiplier)


# --- The search ---------------------------------------------------------------------

_TOLERANCE = {False: 1e-3, True: 2e-4}  # of epsilon; by whether numbers are whole


def _solve(
    at: Callable[[float], PrivacyPlan],
    epsilon: Any,
    safe: float,
    unsafe: float,
    *,
    whole: bool,
) -> float:
    """Returns the number nearest to `unsafe` whose plan stays within epsilon.

    The Renyi estimate, corrected by the ratio seen at the last exact evaluation,
    proposes the next one; every fourth is the middle, so that it always ends.
    """
    target = float(epsilon)
    if at(safe).epsilon() > target:
        raise ValueError(
            f"epsilon {epsilon} cannot be reached: it is exceeded even at {safe:g}, "
            "the most private choice; choose a larger epsilon or delta, or more noise."
        )
    if _rough(at(unsafe)) <= 3 * target and at(unsafe).epsilon() <= target:
        return unsafe
    tolerance, correction = _TOLERANCE[whole], 1.0
    for turn in range(1, 60):
        if _settled(safe, unsafe, whole):
            break
        aim = target * (1 - tolerance / 2) / correction
        guess = math.sqrt(safe * unsafe)
        if turn % 4:
            guess = _where(lambda x, y=aim: _rough(at(x)) <= y, safe, unsafe, whole)
        guess = _inside(guess, safe, unsafe, whole)
        value = at(guess).epsilon()
        if value > target:
            unsafe = guess
        else:
            safe = guess
            if value >= target * (1 - tolerance):
                break
        rough = _rough(at(guess))
        correction = value / rough if 0 < rough < math.inf and value > 0 else 1.0
    return safe


def _rough(plan: PrivacyPlan) -> float:
    return accounting.estimate(
        plan.event(),
        plan.delta,
        accountant=plan.accountant,
        neighboring_relation=plan.neighboring_relation,
    )


def _where(holds: Callable[[float], bool], safe: float, unsafe: float, whole) -> float:
    """Bisects on a log scale for the last number from `safe` on where `holds`."""
    while not _settled(safe, unsafe, whole):
        middle = _inside(math.sqrt(safe * unsafe), safe, unsafe, whole)
        if holds(middle):
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
    return max(safe, unsafe) / min(safe, unsafe) < 1 + 1e-6
