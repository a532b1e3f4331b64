"""Checks of a plan at its construction: every number that cannot be is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

from dp_ilg import validation
from dp_ilg.accounting import accountants
from dp_ilg.accounting.charges import noise_law
from dp_ilg.accounting.correlated import strategies
from dp_ilg.accounting.statements import units

_MOST = 2**53  # above, floating point cannot tell a count from the next


def steps_of(asked: Any) -> Any:
    """The number of steps that a caller asked for, by itself or by epochs.

    Args:
        asked: has `num_steps`, `num_epochs`, `num_examples` and `batch_size`.

    Returns:
        `num_steps` as it was given, or `num_epochs` in steps, rounded up.

    Raises:
        TypeError: if neither was given.
        ValueError: if both were, and for epochs that are no positive number.

    Example:
        >>> from types import SimpleNamespace
        >>> steps_of(SimpleNamespace(
        ...     num_steps=None, num_epochs=10, num_examples=60_000, batch_size=1024))
        586
    """
    steps, epochs = asked.num_steps, asked.num_epochs
    if steps is None and epochs is None:
        raise TypeError("Neither num_steps nor num_epochs was given; give one.")
    if steps is not None and epochs is not None:
        raise ValueError(
            f"num_steps is {steps!r} and num_epochs is {epochs!r}, but only one of "
            "them can be given; leave the other out."
        )
    if epochs is None:
        return steps
    validation.positive("num_epochs", epochs)
    for name in ("num_examples", "batch_size"):
        validation.whole(name, getattr(asked, name), most=_MOST)
    exact = float(epochs) * int(asked.num_examples) / int(asked.batch_size)
    return math.ceil(exact * (1 - 1e-12))  # 3 epochs of 100 steps are 300


def check(plan: Any) -> None:
    """Raises unless the fields of a plan make a valid one.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Raises:
        ValueError: in one sentence, for the first field that does not.

    Example:
        >>> from dp_ilg.accounting.plan import PrivacyPlan
        >>> PrivacyPlan(
        ...     num_examples=100, batch_size=10, num_steps=3, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.6, metric_budget=0.5,
        ...     stages=((3, 2.0),))
        Traceback (most recent call last):
        ValueError: score_budget is 0.6 and metric_budget is 0.5, which leaves ...
    """
    for name in ("num_examples", "batch_size", "num_steps"):
        validation.whole(name, getattr(plan, name), most=_MOST)
    if plan.batch_size > plan.num_examples:
        raise ValueError(
            f"batch_size is {plan.batch_size}, but there are only {plan.num_examples} "
            "examples; choose a batch size of at most num_examples."
        )
    if plan.max_batch_size is not None:
        validation.whole("max_batch_size", plan.max_batch_size, plan.batch_size, _MOST)
    validation.fraction("delta", plan.delta)
    validation.positive("l2_clip_norm", plan.l2_clip_norm)
    _check_budgets(plan)
    if plan.target_epsilon is not None:
        validation.positive("target_epsilon", plan.target_epsilon)
    accountants.check_names(plan.accountant, plan.neighboring_relation)
    noise_law.check(plan)
    _check_stages(plan)
    _check_prior(plan.prior_releases)
    _check_strategy(plan)
    units.check(plan.unit)


def _check_strategy(plan: Any) -> None:
    strategies.check(plan.strategy)
    if not plan.strategy:
        return
    bands = len(plan.strategy)
    if bands > plan.num_steps:
        raise ValueError(
            f"strategy has {bands} coefficients, but the plan has {plan.num_steps} "
            "steps; use at most as many bands as steps."
        )
    if bands * plan.batch_size > plan.num_examples:
        raise ValueError(
            f"{bands} bands deal {plan.num_examples:,} examples to parts of about "
            f"{plan.num_examples / bands:,.0f}, fewer than a batch of "
            f"{plan.batch_size:,}; use at most {plan.num_examples // plan.batch_size} "
            "bands or smaller batches."
        )
    if plan.max_batch_size is not None:
        raise ValueError(
            f"max_batch_size is {plan.max_batch_size}, but cut batches couple the "
            "examples and are not accounted with bands; leave one of them out."
        )
    if plan.row_budget:
        raise ValueError(
            f"row_budget is {plan.row_budget:g}, but rows that come and go break the "
            "correlation of their noise; leave row_budget or bands out."
        )


def warn_of_delta(plan: Any, level: int = 3) -> None:
    """Warns of a delta that one example drawn at random would satisfy.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.
        level: how far up the warning points, as ``stacklevel``.

    Example:
        >>> from types import SimpleNamespace
        >>> warn_of_delta(SimpleNamespace(delta=1e-6, num_examples=1000))
    """
    if plan.delta > 1 / plan.num_examples:
        warnings.warn(
            f"delta is {plan.delta:g}, above 1 / num_examples = "
            f"{1 / plan.num_examples:.3g}, so publishing one example drawn at random "
            "would satisfy the guarantee; choose a smaller delta.",
            UserWarning,
            stacklevel=level,
        )


def check_left(plan: Any) -> None:
    """Raises if the prior releases alone cost what was asked for.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Raises:
        ValueError: then, with what they cost.

    Example:
        >>> import dp_ilg
        >>> dp_ilg.plan_privacy(epsilon=0.1, delta=1e-5, num_examples=1000,
        ...     batch_size=10, num_steps=10, prior_releases=(("pca", 1.0),))
        Traceback (most recent call last):
        ValueError: epsilon is 0.1, but pca alone costs ...
    """
    spent = plan.epsilon(0)
    target = plan.target_epsilon
    if target is not None and spent >= target:
        names = ", ".join(name for name, _ in plan.prior_releases)
        raise ValueError(
            f"epsilon is {target:g}, but {names} alone costs {spent:.4g}, so the budget"
            " is too small for one step; give it more noise or choose a larger epsilon."
        )


def _check_budgets(plan: Any) -> None:
    for name in ("score_budget", "metric_budget", "row_budget"):
        validation.fraction(name, getattr(plan, name), include_zero=True)
    if not plan.score_budget + plan.metric_budget + plan.row_budget < 1:
        rows = f", row_budget is {plan.row_budget:g}" if plan.row_budget else ""
        raise ValueError(
            f"score_budget is {plan.score_budget:g}{rows} and metric_budget is "
            f"{plan.metric_budget:g}, which leaves nothing for the gradient; their sum "
            "must be below 1."
        )


def _check_prior(releases: Any) -> None:
    if not isinstance(releases, tuple | list):
        raise ValueError(
            f"prior_releases is {releases!r}, but must be a tuple of pairs of a name "
            "and a noise multiplier."
        )
    for release in releases:
        pair = isinstance(release, tuple | list) and len(release) == 2
        if not (pair and isinstance(release[0], str) and release[0].strip()):
            raise ValueError(
                f"The prior release {release!r} must be a pair of a name and a noise "
                "multiplier, such as ('DP-PCA', 16.0)."
            )
        validation.positive(f"the noise multiplier of {release[0]!r}", release[1])


def _check_stages(plan: Any) -> None:
    if not isinstance(plan.stages, tuple | list):
        raise ValueError(
            f"stages is {plan.stages!r}, but must be a tuple of pairs of a number of "
            "steps and a noise multiplier."
        )
    total = 0
    for stage in plan.stages:
        if not (isinstance(stage, tuple | list) and len(stage) == 2):
            raise ValueError(
                f"The stage {stage!r} must be a pair of a number of steps and a noise "
                "multiplier."
            )
        validation.whole("the number of steps of a stage", stage[0])
        if stage[1] != 0:
            validation.positive("the noise multiplier of a stage", stage[1])
        total += stage[0]
    if total != plan.num_steps:
        raise ValueError(
            f"The stages have {total} steps but num_steps is {plan.num_steps}; they "
            "must agree."
        )
