"""Which entries of a parameter a traced variable holds.

A `View` says that a variable is a parameter leaf up to isometries: transposed,
reshaped, cast, sliced or times a constant. It is written in digits: a coordinate of
the leaf along one axis is a start plus the sum of digit times step, as in a mixed
radix; where the leaf is read backwards the step is negative. Views laid one after the
other are `Joined`. All of it is static; no array is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal


class Digit(NamedTuple):
    """One digit of the coordinate along `axis` of the leaf."""

    axis: int
    size: int
    step: int


Digits = tuple[Digit, ...]


class Turns(NamedTuple):
    """A loop around a variable: its length, and the digits it runs over.

    None says that every turn sees the same entries.
    """

    length: int
    digits: Digits | None


@dataclass(frozen=True)
class View:
    """A variable that holds entries of one leaf, each once.

    Attributes:
        leaf: index of the leaf.
        axes: the digits of every axis of the variable, major first.
        starts: first coordinate along every axis of the leaf.
        scale: the constant the entries were multiplied by.
        loops: the enclosing loops, outermost first.
    """

    leaf: int
    axes: tuple[Digits, ...]
    starts: tuple[int, ...]
    scale: float = 1.0
    loops: tuple[Turns, ...] = ()


@dataclass(frozen=True)
class Joined:
    """A variable whose pieces along one axis are views, or hold no parameter.

    Attributes:
        axis: along which the pieces lie.
        pieces: the length of each, and its view or None.
    """

    axis: int
    pieces: tuple[tuple[int, View | None], ...]


Held = View | Joined
"""What a variable may hold of parameters."""


def views_in(held: Held) -> list[View]:
    """The views a variable holds.

    Example:
        >>> len(views_in(Joined(0, ((3, whole(0, (3,))), (2, None)))))
        1
    """
    if isinstance(held, View):
        return [held]
    return [view for _, view in held.pieces if view is not None]


def each_view(held: Held, change: Callable[[View], View | None]) -> Held | None:
    """What is held with every view changed, or None where nothing is left."""
    if isinstance(held, View):
        return change(held)
    pieces = [(size, view and change(view)) for size, view in held.pieces]
    changed = Joined(held.axis, tuple(pieces))
    return changed if views_in(changed) else None


def join(eqn: Any, found: Sequence[Held | None]) -> Joined | None:
    """What a concatenation holds, if its operands are views or hold nothing."""
    axis = int(eqn.params["dimension"])
    pieces: list[tuple[int, View | None]] = []
    for var, held in zip(eqn.invars, found, strict=True):
        if isinstance(held, Joined) and held.axis != axis:
            return None
        if isinstance(held, Joined):
            pieces += held.pieces
        else:
            pieces.append((var.aval.shape[axis], held))
    return Joined(axis, tuple(pieces))


def whole(leaf: int, shape: Sequence[int]) -> View:
    """The leaf itself.

    Example:
        >>> whole(0, (3, 1)).axes
        ((Digit(axis=0, size=3, step=1),), ())
    """
    axes = tuple((Digit(k, n, 1),) if n != 1 else () for k, n in enumerate(shape))
    return View(leaf, axes, (0,) * len(axes))


def span(digits: Sequence[Digit]) -> int:
    """How many values the digits take together."""
    return math.prod(d.size for d in digits)


def regroup(digits: Sequence[Digit], sizes: Sequence[int]) -> list[Digits] | None:
    """Deals digits out to axes of the given sizes, splitting where that is exact.

    Example:
        >>> regroup([Digit(0, 6, 1)], (2, 3))
        [(Digit(axis=0, size=2, step=3),), (Digit(axis=0, size=3, step=1),)]
    """
    left, out = list(digits), []
    for size in sizes:
        got: list[Digit] = []
        while size > 1:
            if not left:
                return None
            digit = left.pop(0)
            if size % digit.size == 0:
                got.append(digit)
                size //= digit.size
            elif digit.size % size == 0:
                inner = digit.size // size
                got.append(Digit(digit.axis, size, digit.step * inner))
                left.insert(0, Digit(digit.axis, inner, digit.step))
                size = 1
            else:
                return None
        out.append(tuple(got))
    return None if left else out


def merged(digits: Sequence[Digit]) -> Digits:
    """The digits with neighbours joined that make up one longer digit."""
    out: list[Digit] = []
    for digit in digits:
        last = out[-1] if out else None
        if last and last.axis == digit.axis and last.step == digit.step * digit.size:
            out[-1] = Digit(digit.axis, last.size * digit.size, digit.step)
        else:
            out.append(digit)
    return tuple(out)


def order(digits: Sequence[Digit]) -> list[int]:
    """The permutation that puts digits in the order of the leaf's own layout.

    Digits that run backwards keep doing so, see `backwards`.
    """
    places = range(len(digits))
    return sorted(places, key=lambda i: (digits[i].axis, -abs(digits[i].step)))


def backwards(digits: Sequence[Digit]) -> list[int]:
    """Which of the digits run against the leaf's own layout."""
    return [k for k, digit in enumerate(digits) if digit.step < 0]


def coordinates(digits: Sequence[Digit], axis: int, start: int) -> np.ndarray:
    """Coordinates along an axis of the leaf that the digits reach, in their order."""
    found = np.array([start])
    for digit in digits:
        if digit.axis == axis:
            steps = np.arange(digit.size) * digit.step
            found = (found[:, None] + steps).reshape(-1)
    return found


def view_op(eqn: Any, held: Held) -> Sequence[Held] | None:
    """What the outputs of an equation hold that reads a view first, if still views."""
    rule = _VIEW_OPS.get(eqn.primitive.name)
    if rule is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    if isinstance(held, View):
        return rule(eqn, held)
    moves = _JOINED_OPS.get(eqn.primitive.name)
    axis = None if moves is None else moves(eqn, held.axis)
    if axis is None:
        return None
    pieces: list[tuple[int, View | None]] = []
    for size, view in held.pieces:
        found = None if view is None else rule(eqn, view)
        if view is not None and not found:
            return None
        pieces.append((size, found[0] if found else None))
    return [Joined(axis, tuple(pieces))]


def _same(eqn: Any, view: View) -> list[View]:
    return [view]


def _transpose(eqn: Any, view: View) -> list[View]:
    return [replace(view, axes=tuple(view.axes[k] for k in eqn.params["permutation"]))]


def _reshape(eqn: Any, view: View) -> list[View] | None:
    digits = [d for axis in view.axes for d in axis]
    axes = regroup(merged(digits), eqn.outvars[0].aval.shape)
    return None if axes is None else [replace(view, axes=tuple(axes))]


def _squeeze(eqn: Any, view: View) -> list[View]:
    gone = {k % len(view.axes) for k in eqn.params["dimensions"]}
    kept = [axis for k, axis in enumerate(view.axes) if k not in gone]
    return [replace(view, axes=tuple(kept))]


def _broadcast(eqn: Any, view: View) -> list[View] | None:
    """Adding axes of length 1 keeps every entry once; repeating does not."""
    shape = eqn.outvars[0].aval.shape
    if math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
        return None
    axes: list[Digits] = [()] * len(shape)
    for axis, place in zip(view.axes, eqn.params["broadcast_dimensions"], strict=True):
        axes[place] = axis
    return [replace(view, axes=tuple(axes))]


def _reverse(eqn: Any, view: View) -> list[View]:
    """Every digit of a reversed axis starts at its end and runs backwards."""
    axes, starts = list(view.axes), list(view.starts)
    for axis in eqn.params["dimensions"]:
        for digit in view.axes[axis]:
            starts[digit.axis] += (digit.size - 1) * digit.step
        axes[axis] = tuple(d._replace(step=-d.step) for d in view.axes[axis])
    return [replace(view, axes=tuple(axes), starts=tuple(starts))]


def _cut(view: View, axis: int, start: int, size: int, stride: int) -> View | None:
    """Entries start, start + stride, ... of one axis of a view."""
    digits = merged(view.axes[axis])
    if size == span(digits) and stride == 1:
        return view
    if len(digits) != 1:
        return None
    (digit,) = digits
    starts = list(view.starts)
    starts[digit.axis] += start * digit.step
    left = Digit(digit.axis, size, digit.step * stride)
    axes = list(view.axes)
    axes[axis] = (left,) if size != 1 else ()
    return replace(view, axes=tuple(axes), starts=tuple(starts))


def _slice(eqn: Any, view: View) -> list[View] | None:
    out: View | None = view
    strides = eqn.params["strides"] or (1,) * len(view.axes)
    shape = eqn.outvars[0].aval.shape
    starts = eqn.params["start_indices"]
    for axis, facts in enumerate(zip(starts, shape, strides, strict=True)):
        out = out and _cut(out, axis, *facts)
    return out and [out]


def _split(eqn: Any, view: View) -> list[View] | None:
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    starts = np.cumsum([0, *sizes])
    cuts = [
        _cut(view, axis, int(start), int(size), 1)
        for start, size in zip(starts, sizes, strict=False)
    ]
    kept = [cut for cut in cuts if cut is not None]
    return kept if len(kept) == len(cuts) else None


def _negate(eqn: Any, view: View) -> list[View]:
    return [replace(view, scale=-view.scale)]


def _times(eqn: Any, view: View) -> list[View] | None:
    """Multiplied or divided by a number that stands in the program."""
    first, second = eqn.invars
    factor = second if isinstance(second, Literal) else first
    if not isinstance(factor, Literal) or np.shape(factor.val) != ():
        return None
    number = float(factor.val)
    if eqn.primitive.name == "div":
        if factor is first or number == 0:
            return None
        number = 1 / number
    if number == 0 or not math.isfinite(number):
        return None
    return [replace(view, scale=view.scale * number)]


_VIEW_OPS: dict[str, Callable[[Any, View], list[View] | None]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "div": _times,
    "mul": _times,
    "name": _same,
    "neg": _negate,
    "reduce_precision": _same,
    "reshape": _reshape,
    "rev": _reverse,
    "sharding_constraint": _same,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}


def _stays(eqn: Any, axis: int) -> int:
    return axis


def _transposed(eqn: Any, axis: int) -> int:
    return tuple(eqn.params["permutation"]).index(axis)


def _unreversed(eqn: Any, axis: int) -> int | None:
    return None if axis in eqn.params["dimensions"] else axis


_JOINED_OPS: dict[str, Callable[[Any, int], int | None]] = {
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "div", "mul"), _stays),
    **dict.fromkeys(("name", "neg", "reduce_precision"), _stays),
    "rev": _unreversed,
    "transpose": _transposed,
}
"""Where an equation puts the axis that views are joined along, or None."""
