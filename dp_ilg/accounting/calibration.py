"""Calibration: the noise, the steps or the batch size that an epsilon allows.

Epsilon is monotone in each of them, so a cheap Renyi bound finds the neighbourhood and
few evaluations of the chosen accountant settle it. What is returned never exceeds the
target.
"""

import dataclasses
import functools
from typing import Any, SupportsFloat, SupportsIndex

from dp_ilg import validation
from dp_ilg.accounting import plan_checks, schedules, search
from dp_ilg.accounting.correlated import choice
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.shapes import multipliers_of

_CONSTANT = schedules.constant()
_NOT_IN_A_PLAN = (
    "epsilon",
    "noise_multiplier",
    "schedule",
    "num_stages",
    "num_epochs",
    "bands",
)
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6
_MOST_STEPS = 1_000_000

PriorReleases = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `plan_privacy` and its inverses are asked for, as the caller gave it.

    Nothing is checked yet: `template` checks what is in a plan, `shaped` the schedule
    too. The number of steps or the batch size is None while it is sought.
    """

    epsilon: Any
    noise_multiplier: Any
    delta: Any
    num_examples: Any
    batch_size: Any = None
    num_steps: Any = None
    num_epochs: Any = None
    schedule: Any
    score_budget: Any
    l2_clip_norm: Any
    accountant: Any
    neighboring_relation: Any
    num_stages: Any
    prior_releases: Any
    max_batch_size: Any
    num_parameters: Any
    exact_noise: Any
    metric_budget: Any
    row_budget: Any
    bands: Any = None
    strategy: Any = ()
    unit: Any = None

    def template(self) -> PrivacyPlan:
        """Returns the plan with noise 1 throughout."""
        steps = plan_checks.steps_of(self)
        facts = dict(vars(self), target_epsilon=self.epsilon, num_steps=steps)
        for name in _NOT_IN_A_PLAN:
            del facts[name]
        return PrivacyPlan(stages=((steps, 1.0),), **facts)

    def shaped(self) -> PrivacyPlan:
        """Returns the plan whose noise is the schedule, unscaled."""
        plan = self.template()
        schedule = schedules.as_schedule(self.schedule)
        values = multipliers_of(schedule, plan.num_steps, 1 / plan.sampling_prob)
        stages = schedules.to_stages(values, self.num_stages)
        return dataclasses.replace(plan, stages=stages)


# The lists of keywords below stay long: they are what editors, type checkers and the
# documentation show. As first statement, `locals()` is exactly the arguments.


def plan_privacy(
    *,
    epsilon: SupportsFloat | None = None,
    noise_multiplier: SupportsFloat | None = None,
    delta: SupportsFloat,
    num_examples: SupportsIndex,
    batch_size: SupportsIndex,
    num_steps: SupportsIndex | None = None,
    num_epochs: SupportsFloat | None = None,
    schedule: Any = _CONSTANT,
    score_budget: SupportsFloat = 0.01,
    l2_clip_norm: SupportsFloat = 1.0,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    num_stages: SupportsIndex = 16,
    prior_releases: PriorReleases = (),
    max_batch_size: SupportsIndex | None = None,
    num_parameters: SupportsIndex | None = None,
    exact_noise: bool = False,
    metric_budget: SupportsFloat = 0.0,
    row_budget: SupportsFloat = 0.0,
    bands: Any = None,
    strategy: Any = (),
    unit: str | None = None,
) -> PrivacyPlan:
    """Plans a run: finds the noise for a target epsilon, or takes it as given.

    The whole schedule is scaled. It is made piecewise constant on at most
    `num_stages` stages first, so the plan's multipliers are exactly those accounted.

    Args:
        epsilon: the target, at least 1e-6; the plan's epsilon is at most it and within
            0.5 % of it.
        noise_multiplier: instead of `epsilon`, the scale of the schedule: the
            effective multiplier z where the schedule is 1. With 0 there is no privacy,
            and the plan's statement says so.
        delta: the delta of the guarantee, best below 1 / num_examples; for ``"pld"`` at
            least 1e-30.
        num_examples: the number of training examples.
        batch_size: the expected batch size.
        num_steps: the number of steps.
        num_epochs: instead of `num_steps`, how often an example takes part on average;
            rounded up to whole steps of ``batch_size / num_examples`` epochs.
        schedule: the shape of the noise over the steps: from `dp_ilg.schedules`, any
            function of the step (such as Optax's), one number a step, or a name.
        score_budget: the share of each step's budget for layer scores, in [0, 1).
        l2_clip_norm: the bound of one example's gradient.
        accountant: ``"pld"`` (tightest), ``"rdp"`` or ``"zcdp"``.
        neighboring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.
        num_stages: the largest number of distinct multipliers; accounting time grows
            with it.
        prior_releases: pairs of a name and a noise multiplier, for noisy sums over all
            training examples that share the budget (`dp_ilg.private_pca`).
        max_batch_size: cut larger draws to this size, so that every batch fits one
            compiled shape; costs little where cuts are rare
            (`dp_ilg.accounting.truncation`).
        num_parameters: the most coordinates that noise is drawn for in a step, scores
            included; None for a billion, or as many as 1 % of delta pays for.
        exact_noise: draw from an exact sampler only (`dp_ilg.noise.exact`); slower.
        metric_budget: the share for released metrics, in [0, 1); 0.005 is plenty.
        row_budget: the share for choosing an embedding's rows (`dp_ilg.keep_rows`).
        bands: over how many steps noise is correlated so that it cancels in their sum
            (`dp_ilg.accounting.correlated`); "auto" for the number that leaves least,
            None for independent noise.
        strategy: instead of `bands`, the coefficients themselves.
        unit: "user" to protect users, each with all examples: N and B count users then,
            drawn by `dp_ilg.sampling.users`.

    Returns:
        The plan.

    Raises:
        ValueError: for any value that makes no valid plan, unless exactly one of
            `epsilon` and `noise_multiplier` is given, or if the target cannot be
            reached.

    Privacy:
        Holds for the relation named and batches drawn by Poisson sampling, with bands
        by `PoissonSampler` with as many parts. These arguments must not depend on the
        data.

    Example:
        >>> plan = plan_privacy(epsilon=2.0, delta=1e-5, num_examples=60_000,
        ...                     batch_size=1024, num_steps=600)
        >>> 1.99 < plan.epsilon() <= 2.0
        True
        >>> round(float(plan.noise_multipliers[0]), 2)
        1.13
    """
    asked = choice.with_strategy(Calibration(**locals()), plan_privacy)
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            f"epsilon is {epsilon!r} and noise_multiplier is {noise_multiplier!r}, but "
            "exactly one of them must be given."
        )
    plan_checks.warn_of_delta(asked.template())
    search.check_answerable(epsilon, delta, accountant)
    plan = asked.shaped()
    if epsilon is None:
        if noise_multiplier != 0:
            validation.positive("noise_multiplier", noise_multiplier)
        return _scaled(plan, noise_multiplier)
    plan_checks.check_left(plan)
    scale = search.furthest_plan(
        lambda x: _scaled(plan, x), epsilon, _MOST_NOISE, _LEAST_NOISE, whole=False
    )
    if scale == _LEAST_NOISE:
        raise ValueError(
            f"epsilon {epsilon} at delta {delta} holds without any noise, because an "
            "example is hardly ever drawn; choose a smaller epsilon or delta."
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
    prior_releases: PriorReleases = (),
    max_batch_size: SupportsIndex | None = None,
    num_parameters: SupportsIndex | None = None,
    exact_noise: bool = False,
    metric_budget: SupportsFloat = 0.0,
    row_budget: SupportsFloat = 0.0,
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
        prior_releases: as in `plan_privacy`.
        max_batch_size: as in `plan_privacy`.
        num_parameters: as in `plan_privacy`.
        exact_noise: as in `plan_privacy`.
        metric_budget: as in `plan_privacy`.
        row_budget: as in `plan_privacy`.

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
    plan = _largest("num_steps", Calibration(**locals()), _MOST_STEPS)
    if plan.num_steps == _MOST_STEPS:
        raise ValueError(
            f"epsilon {epsilon} allows more than {_MOST_STEPS:,} steps; use less noise "
            "or a larger batch."
        )
    plan_checks.warn_of_delta(plan)
    return plan


def batch_size_for_epsilon(
    *,
    epsilon: SupportsFloat,
    noise_multiplier: SupportsFloat,
    delta: SupportsFloat,
    num_examples: SupportsIndex,
    num_steps: SupportsIndex | None = None,
    num_epochs: SupportsFloat | None = None,
    schedule: Any = _CONSTANT,
    score_budget: SupportsFloat = 0.01,
    l2_clip_norm: SupportsFloat = 1.0,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    num_stages: SupportsIndex = 16,
    prior_releases: PriorReleases = (),
    max_batch_size: SupportsIndex | None = None,
    num_parameters: SupportsIndex | None = None,
    exact_noise: bool = False,
    metric_budget: SupportsFloat = 0.0,
    row_budget: SupportsFloat = 0.0,
) -> PrivacyPlan:
    """Plans the largest expected batch that a target epsilon allows at a given noise.

    Args:
        epsilon: the target; the plan's epsilon is at most it.
        noise_multiplier: the scale of the schedule, above 0.
        delta: as in `plan_privacy`.
        num_examples: as in `plan_privacy`.
        num_steps: as in `plan_privacy`.
        num_epochs: as in `plan_privacy`; then a larger batch means fewer steps.
        schedule: as in `plan_privacy`.
        score_budget: as in `plan_privacy`.
        l2_clip_norm: as in `plan_privacy`.
        accountant: as in `plan_privacy`; zCDP knows no sampling, so with it any batch
            is possible or none.
        neighboring_relation: as in `plan_privacy`.
        num_stages: as in `plan_privacy`.
        prior_releases: as in `plan_privacy`.
        max_batch_size: as in `plan_privacy`.
        num_parameters: as in `plan_privacy`.
        exact_noise: as in `plan_privacy`.
        metric_budget: as in `plan_privacy`.
        row_budget: as in `plan_privacy`.

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
    asked = Calibration(**locals())
    if max_batch_size is not None:
        validation.whole("max_batch_size", max_batch_size)
    limits = [x for x in (asked.num_examples, asked.max_batch_size) if x]
    plan = _largest("batch_size", asked, min(limits, default=1))
    plan_checks.warn_of_delta(plan)
    return plan


def _largest(name: str, asked: Calibration, most: Any) -> PrivacyPlan:
    """The plan with the largest value of the field `name` that epsilon allows."""
    validation.positive("epsilon", asked.epsilon)
    validation.positive("noise_multiplier", asked.noise_multiplier)
    changed = functools.partial(dataclasses.replace, asked)
    plan_checks.check_left(changed(**{name: 1}).template())
    search.check_answerable(asked.epsilon, asked.delta, asked.accountant)

    def at(value: float) -> PrivacyPlan:
        plan = changed(**{name: int(value)}).shaped()
        return _scaled(plan, asked.noise_multiplier)

    return at(search.furthest_plan(at, asked.epsilon, 1, most, whole=True))


def _scaled(plan: PrivacyPlan, scale: Any) -> PrivacyPlan:
    stages = tuple((count, z * float(scale)) for count, z in plan.stages)
    return dataclasses.replace(plan, stages=stages)
