"""The guarantee in five bullets, for somebody who reads one page about it."""

import math
from collections.abc import Mapping
from typing import Any

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements.membership import right_guesses, right_guesses_of
from dp_ilg.accounting.statements.statement import round_up
from dp_ilg.accounting.statements.units import unit_of
from dp_ilg.experiments.reports.words import short, shown_epsilon

Bullets = list[tuple[str, str]]
_BOTH = {
    "add_or_remove_one": "whether the training data contained that example",
    "replace_one": "which of two examples the training data contained",
}


def bullets(plan: PrivacyPlan, steps: int) -> Bullets:
    """What is guaranteed after some steps: title and a sentence or two, five times.

    Args:
        plan: of the run.
        steps: the steps that may have been released.

    Returns:
        Promise, who is protected, yardstick, how, and limits; none without privacy.

    Example:
        >>> plan = PrivacyPlan(
        ...     num_examples=1000, batch_size=100, num_steps=9, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.0, stages=((9, 1.0),))
        >>> [title for title, _ in bullets(plan, 9)][2]
        'What that means'
        >>> bullets(PrivacyPlan(**{**vars(plan), "stages": ((9, 0.0),)}), 9)
        []
    """
    facts = plan.statement(steps).as_dict()
    if not facts["private"]:
        return []
    return [
        ("The promise", _promise(plan, facts)),
        ("Who is protected", _protected(plan)),
        ("What that means", _yardstick(plan, steps)),
        ("How it is kept", _mechanism(plan, facts)),
        ("Where it ends", _limits(plan, steps)),
    ]


def _promise(plan: PrivacyPlan, facts: Mapping[str, Any]) -> str:
    shown = shown_epsilon(facts["epsilon"])
    factor = math.exp(min(facts["epsilon"], 700.0))
    times = round_up(factor) if factor < 1e6 else f"exp({shown})"
    return (
        f"ε = {shown} at δ = {short(plan.delta)}. Whatever somebody looks for in what "
        f"was released, one {unit_of(plan).noun} makes it at most {times} times as "
        f"likely, plus a probability of at most {short(plan.delta)}."
    )


def _protected(plan: PrivacyPlan) -> str:
    unit = unit_of(plan)
    who = unit.one[0].upper() + unit.one[1:]
    return (
        f"{who}, of {plan.num_examples:,}: the comparison is between the data and the "
        f"same after {unit.relations[plan.neighboring_relation]}. {unit.beside}"
    )


def _yardstick(plan: PrivacyPlan, steps: int) -> str:
    own = right_guesses_of(plan, steps)
    any_such = right_guesses(plan.epsilon(steps), plan.delta)
    return (
        "An attacker knows all other examples, and tosses a coin on "
        f"{_BOTH[plan.neighboring_relation]}. Having seen everything released, he is "
        f"right at most {_percent(own)} of the time instead of 50 %. (Epsilon and "
        f"delta alone, without what is known of this run, allow {_percent(any_such)}.)"
    )


def _percent(share: float) -> str:
    """Rounded up, and to more digits only where one would make it certainty."""
    for digits in (1, 2, 4):
        shown = math.ceil(100 * share * 10**digits - 1e-9) / 10**digits
        if shown < 100:
            return f"{shown:.{digits}f} %"
    return "100 %"


def _mechanism(plan: PrivacyPlan, facts: Mapping[str, Any]) -> str:
    least, most = facts["smallest_noise_multiplier"], facts["largest_noise_multiplier"]
    noise = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    return (
        f"In each of {facts['steps']:,} steps every example takes part by chance, with "
        f"probability {plan.sampling_prob:.4g}. Its gradient is cut to a length of "
        f"{plan.l2_clip_norm:g}, and noise of {noise} times that length is added "
        "before anything is used or shown."
    )


def _limits(plan: PrivacyPlan, steps: int) -> str:
    early = ""
    if steps < plan.num_steps:
        early = (
            f" The run took {steps:,} of {plan.num_steps:,} planned steps; if a result "
            "decided when to stop, ε is that of the whole plan, "
            f"{shown_epsilon(plan.epsilon())}."
        )
    return (
        "It holds for what this run released, not for settings that were chosen by "
        "looking at these data, nor for the list under “Not covered”." + early
    )
