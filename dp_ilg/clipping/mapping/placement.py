"""Which factor of a part each axis of a mapped leaf lies in: static facts.

The gradient of a part is ``sum_t first_t x second_t``. A matrix along an axis that lies
in one factor as a whole acts on that factor, and a scale on any entries of it. What
lies across both factors has no such form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.clipping.bookkeeping.parts import Part
from dp_ilg.clipping.bookkeeping.views import Digit, Digits

Kinds = tuple[int, ...]
"""For each axis of a leaf 0 (it stays), 1 (a scale) or 2 (a matrix)."""


class Scaled(NamedTuple):
    """A scale on one factor.

    Attributes:
        axis: of the leaf.
        factor: "first" or "second".
        places: which entry of the scale each entry of the factor takes,
            ``[blocks or 1, entries]``.
    """

    axis: int
    factor: str
    places: np.ndarray


class Turned(NamedTuple):
    """A matrix on one factor, whose entries lie as ``[before, size, after]``."""

    axis: int
    factor: str
    lying: tuple[int, int, int]


class Placement(NamedTuple):
    """Where all factors of a map act on a part."""

    scales: tuple[Scaled, ...]
    matrices: tuple[Turned, ...]

    def __str__(self) -> str:
        """What is done, for `explain`."""
        words = [f"a scale on axis {own.axis}" for own in self.scales]
        words += [f"a matrix on axis {own.axis}" for own in self.matrices]
        return "mapped by " + " and ".join(words)

    def flops(self, part: Part) -> int:
        """Multiplications and additions for one example, in factors."""
        widths: dict[str, int] = dict(
            zip(("first", "second"), part.shape[1:], strict=True)
        )
        own = sum(widths[s.factor] for s in self.scales)
        own += sum(2 * widths[m.factor] * m.lying[1] for m in self.matrices)
        return part.shape[0] * part.terms * own


def placement(part: Part, kinds: Kinds, shape: Sequence[int]) -> Placement | str:
    """Where a map acts on a part, or why it has no form in factors.

    Args:
        part: of a leaf.
        kinds: of the leaf's map.
        shape: of the leaf.

    Returns:
        The `Placement`, or a reason.
    """
    scales: list[Scaled] = []
    matrices: list[Turned] = []
    for axis, kind in enumerate(kinds):
        if kind == 2 and shape[axis] > 1:
            turned = _turned(part, axis, shape[axis])
            if isinstance(turned, str):
                return turned
            matrices.append(turned)
        elif kind:
            scaled = _scaled(part, axis)
            if isinstance(scaled, str):
                return scaled
            scales.append(scaled)
    return Placement(tuple(scales), tuple(matrices))


def placements(
    parts: list[Part], kinds: Sequence[Any], leaves: Any, spoiled: dict[int, str]
) -> dict[int, Placement]:
    """Where maps act on all parts.

    Args:
        parts: of all leaves.
        kinds: of the leaves' maps, or None where a leaf's has none by axes.
        leaves: the `dp_ilg.geometry.groups.LeafGroups`.
        spoiled: leaves without a form in factors are added, with the reason.

    Returns:
        The `Placement` of every part of a leaf that is mapped, by part.
    """
    maps = {}
    for k, part in enumerate(parts):
        own = kinds[part.leaf]
        if any(own):
            found = placement(part, own, leaves[part.leaf].shape)
            if isinstance(found, str):
                spoiled.setdefault(part.leaf, found)
            else:
                maps[k] = found
    return maps


def _holding(part: Part, axis: int) -> list[str]:
    factors = {"batch": part.batch, "first": part.first, "second": part.second}
    return [k for k, own in factors.items() if any(d.axis == axis for d in own)]


def _turned(part: Part, axis: int, size: int) -> Turned | str:
    held = _holding(part, axis)
    digits: Digits = {"first": part.first, "second": part.second}.get(
        held[0] if len(held) == 1 else "", ()
    )
    if Digit(axis, size, 1) not in digits:
        return "a matrix maps an axis that it does not multiply as a whole"
    if held[0] in _rows(part):
        return "a matrix maps the axis of its rows"
    place = digits.index(Digit(axis, size, 1))
    sizes = [d.size for d in digits]
    lying = math.prod(sizes[:place]), size, math.prod(sizes[place + 1 :])
    return Turned(axis, held[0], lying)


def _rows(part: Part) -> set[str]:
    """The factors that some use keeps as row numbers."""
    return {
        "second" if use.swapped else "first"
        for use in part.uses
        if use.use.linear.is_rows
    }


def _scaled(part: Part, axis: int) -> Scaled | str:
    held = _holding(part, axis)
    if {"first", "second"} <= set(held):
        return "a scale runs along an axis that both of its factors share"
    factor = "first" if "first" in held else "second"
    entries = part.first if factor == "first" else part.second
    blocks = _places(part.batch, axis, part.starts[axis]) if "batch" in held else None
    if blocks is None:
        blocks = np.array([part.starts[axis]])
    return Scaled(axis, factor, blocks[:, None] + _places(entries, axis, 0))


def _places(digits: Digits, axis: int, start: int) -> np.ndarray:
    """The coordinate along an axis of every value of the digits."""
    place = np.array([start])
    for digit in digits:
        step = digit.step if digit.axis == axis else 0
        place = (place[:, None] + np.arange(digit.size) * step).reshape(-1)
    return place
