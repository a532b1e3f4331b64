"""Whose privacy a plan is about: the words for one example, or one user."""

from __future__ import annotations

from typing import Any, NamedTuple


class Unit(NamedTuple):
    """How a statement speaks of what is protected.

    Attributes:
        one: the unit.
        noun: what takes part in a step.
        relations: neighbouring relation -> the same in words.
        beside: who is protected less.
    """

    one: str
    noun: str
    relations: dict[str, str]
    beside: str


UNITS: dict[str, Unit] = {
    "example": Unit(
        "one training example",
        "example",
        {
            "add_or_remove_one": "adding one training example to the data or "
            "removing one",
            "replace_one": "replacing one training example by any other",
        },
        "A person who contributed several examples is protected less.",
    ),
    "user": Unit(
        "one user with all of their examples",
        "user",
        {
            "add_or_remove_one": "adding one user with any number of examples to the "
            "data or removing one",
            "replace_one": "replacing all examples of one user by any others",
        },
        "A person who appears as several users is protected less.",
    ),
}
"""Name of a unit -> its words."""


def unit_of(plan: Any) -> Unit:
    """The words for a plan's unit of privacy.

    Args:
        plan: a `dp_ilg.accounting.plan.PrivacyPlan`.

    Returns:
        A row of `UNITS`.

    Example:
        >>> from types import SimpleNamespace
        >>> unit_of(SimpleNamespace(unit="user")).noun
        'user'
    """
    return UNITS[plan.unit or "example"]


def check(unit: Any) -> None:
    """Raises unless a unit is known.

    Args:
        unit: None for examples, or a key of `UNITS`.

    Raises:
        ValueError: for another.

    Example:
        >>> check("household")
        Traceback (most recent call last):
        ValueError: unit is 'household', but must be one of 'example', 'user'.
    """
    if unit is not None and (not isinstance(unit, str) or unit not in UNITS):
        names = ", ".join(repr(name) for name in UNITS)
        raise ValueError(f"unit is {unit!r}, but must be one of {names}.")
