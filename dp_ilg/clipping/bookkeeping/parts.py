"""The uses of one region of a parameter, put into one layout.

Uses that read the same entries, split into the same two factors, add up term by term
into one *part* of the parameter's gradient. All of this is static.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.clipping.bookkeeping.tape import Level, Spoiled, Use
from dp_ilg.clipping.bookkeeping.views import (
    Digits,
    backwards,
    coordinates,
    merged,
    order,
    span,
)
from dp_ilg.geometry.groups import LeafGroups, pieces_of
from dp_ilg.geometry.rounding import gamma

Address = tuple[int, ...]
ERROR_MARGIN = 1 + 2.0**-10
"""What an error bound is made larger by, so that its own rounding is covered."""


@dataclass(frozen=True)
class PartUse:
    """A use of a part; `swapped` where its first factor is the part's second."""

    address: Address
    use: Use
    swapped: bool

    @property
    def terms(self) -> int:
        """Terms of one example, turns of shared loops included."""
        loops = self.use.view.loops
        shared = [turns.length for turns in loops if turns.digits is None]
        return self.use.linear.terms * math.prod(shared)


@dataclass(frozen=True)
class Side:
    """A factor of a part and the pieces of its leaf along it.

    Attributes:
        name: "batch", "first", "second", or "" where the part lies in one piece.
        labels: for every entry of that factor the group it belongs to.
        groups: the groups that occur.
    """

    name: str
    labels: np.ndarray
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A region of a leaf whose gradient is ``sum_t first_t x second_t``."""

    leaf: int
    starts: tuple[int, ...]
    batch: Digits
    first: Digits
    second: Digits
    uses: tuple[PartUse, ...]
    side: Side

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the batch, the first and the second factor."""
        return span(self.batch), span(self.first), span(self.second)

    @property
    def terms(self) -> int:
        """Terms of one example."""
        return sum(use.terms for use in self.uses)

    @property
    def has_rows(self) -> bool:
        """Whether a factor is kept as row numbers."""
        return any(use.use.linear.is_rows for use in self.uses)


class Square(NamedTuple):
    """What is known of the squared norm of one piece of a part, scaled.

    Attributes:
        value: the square as computed, ``[examples]``.
        error: by how much it may be too small at most; docs/rounding.md has the proof.
        size: upper bound of the sum of the norms of the terms, squared; None where
            the sum over examples rounds in proportion to the norm itself.
    """

    value: Array
    error: Array
    size: Array | None = None


def square_with_loss(
    value: Array, roundings: int, underflow: Array | float, lost: Array
) -> tuple[Array, Array]:
    """A computed square and its error where a vector is lost before it is squared.

    The norm is at most ``sqrt(value (1 + gamma) + underflow) + lost``; the error is
    what the square of this exceeds the value by.

    Args:
        value: the square as computed.
        roundings: relative ones in it.
        underflow: what flushed products may have taken from it.
        lost: norm of what is not in it at most.

    Returns:
        The value, and the error, itself rounded upwards.
    """
    own = gamma(roundings, value.dtype) * value + underflow
    error = own + lost * (2 * jnp.sqrt(value + own) + lost)
    return value, ERROR_MARGIN * error


def find_parts(
    level: Level, leaves: Sequence[LeafGroups], spoiled: Spoiled
) -> list[Part]:
    """Collects the uses of a surveyed program into parts.

    Args:
        level: the program.
        leaves: how the leaves divide into groups.
        spoiled: leaves whose uses overlap unalike, or whose blocks cut across a
            factor, are added with the reason.

    Returns:
        The parts of all leaves that are not spoiled.
    """
    uses: dict[Any, list[PartUse]] = {}
    for address, use in level.all_uses():
        key, swapped = _key(use)
        uses.setdefault(key, []).append(PartUse(address, use, swapped))
    parts = []
    for (leaf, starts, batch, first, second), own in uses.items():
        side = _side(leaves[leaf], starts, (batch, first, second))
        if side is None:
            spoiled.setdefault(leaf, "its blocks cut across what it is multiplied by")
            continue
        parts.append(Part(leaf, starts, batch, first, second, tuple(own), side))
    _check_overlap(parts, leaves, spoiled)
    return [part for part in parts if part.leaf not in spoiled]


def _layout(use: Use) -> tuple[Digits, Digits, Digits]:
    """Digits of batch, first and second in the order in which a use lays them out."""
    stacked = [d for turns in use.view.loops for d in turns.digits or ()]
    return (*stacked, *use.linear.batch), use.linear.first, use.linear.second


def _canonical(digits: Digits) -> Digits:
    return merged([digits[k] for k in order(digits)])


def _key(use: Use) -> tuple[Any, bool]:
    batch, first, second = (_canonical(d) for d in _layout(use))
    swapped = (span(second), second) < (span(first), first)
    pair = (second, first) if swapped else (first, second)
    return (use.view.leaf, use.view.starts, batch, *pair), swapped


def _side(
    leaf: LeafGroups, starts: tuple[int, ...], factors: tuple[Digits, ...]
) -> Side | None:
    """Which factor carries the axis a leaf is cut along; None if several do."""
    pieces = pieces_of(leaf)
    if not leaf.edges:
        group = pieces[0][2]
        return Side("", np.zeros(0, int), (group,))
    carrying = [k for k, f in enumerate(factors) if any(d.axis == leaf.axis for d in f)]
    if len(carrying) > 1:
        return None
    start = starts[leaf.axis]
    digits = factors[carrying[0]] if carrying else ()
    place = np.array([start])
    for digit in digits:
        steps = np.arange(digit.size) * (digit.step if digit.axis == leaf.axis else 0)
        place = (place[:, None] + steps).reshape(-1)
    owners = np.array([group for _, _, group in pieces])
    labels = owners[np.searchsorted(np.array(leaf.edges[1:]), place, side="right")]
    if not carrying:
        return Side("", np.zeros(0, int), (int(labels[0]),))
    name = ("batch", "first", "second")[carrying[0]]
    return Side(name, labels, tuple(sorted({int(x) for x in labels})))


def _region(part: Part, rank: int) -> list[np.ndarray]:
    digits = (*part.batch, *part.first, *part.second)
    return [np.sort(coordinates(digits, k, part.starts[k])) for k in range(rank)]


def _check_overlap(
    parts: list[Part], leaves: Sequence[LeafGroups], spoiled: Spoiled
) -> None:
    for index, part in enumerate(parts):
        rank = len(leaves[part.leaf].shape)
        for other in parts[:index]:
            if other.leaf != part.leaf or part.leaf in spoiled:
                continue
            pairs = zip(_region(part, rank), _region(other, rank), strict=True)
            if all(np.intersect1d(a, b).size for a, b in pairs):
                spoiled[part.leaf] = "it is read in two ways that factor unalike"


def arrange(part_use: PartUse, first: Any, second: Array) -> tuple[Any, Any]:
    """Brings the factors of one use into the layout of its part.

    Args:
        part_use: the use.
        first: ``[examples, *loops, batch, terms, entries]``, or `Rows` without the
            last axis.
        second: ``[examples, *loops, batch, terms, entries]``.

    Returns:
        First and second factor of the part, ``[examples, batch, terms, entries]``.
    """
    use = part_use.use
    batch, one, two = _layout(use)
    if isinstance(first, Rows):
        ids = _arranged(first.ids[..., None], use, batch, ())[..., 0]
        first = Rows(ids, first.size)
    else:
        first = _arranged(first, use, batch, one)
    second = _arranged(second, use, batch, two)
    if use.view.scale != 1:
        second = second * np.asarray(use.view.scale, second.dtype)
    return (second, first) if part_use.swapped else (first, second)


def arrange_formed(part: Part, digits: Digits, value: Array) -> Array:
    """Brings gradients ``[examples, ...]``, laid out by `digits`, into a part's shape.

    Returns:
        ``[examples, batch, first, second]``.
    """
    factors = (part.batch, part.first, part.second)
    value = _sorted(value.reshape(value.shape[0], -1), 1, digits)
    canonical = [d for factor in factors for d in factor]
    places = order(canonical)
    value = value.reshape(value.shape[0], *[canonical[k].size for k in places])
    back = [1 + places.index(k) for k in range(len(places))]
    return jnp.transpose(value, (0, *back)).reshape(value.shape[0], *part.shape)


def _arranged(x: Array, use: Use, batch: Digits, entries: Digits) -> Array:
    loops = use.view.loops
    depth = len(loops)
    stacked = [1 + k for k, turns in enumerate(loops) if turns.digits is not None]
    shared = [1 + k for k, turns in enumerate(loops) if turns.digits is None]
    x = jnp.transpose(x, (0, *stacked, 1 + depth, *shared, 2 + depth, 3 + depth))
    width = x.shape[-1]
    terms = math.prod(x.shape[2 + len(stacked) : -1])
    x = x.reshape(x.shape[0], span(batch), terms, width)
    return _sorted(_sorted(x, 1, batch), 3, entries)


def _sorted(x: Array, axis: int, digits: Digits) -> Array:
    """Puts one axis, laid out by `digits`, into the order of the leaf."""
    places = order(digits)
    if places == sorted(places):
        return x
    sizes = [d.size for d in digits]
    split = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
    turned = [axis + k for k in places]
    rest = range(axis + len(sizes), split.ndim)
    return jnp.transpose(split, (*range(axis), *turned, *rest)).reshape(x.shape)


def place(
    part: Part, value: Array, shape: tuple[int, ...], digits: Digits | None = None
) -> Array:
    """Writes a gradient of a part into zeros of the leaf.

    Args:
        part: the part.
        value: laid out by `digits`, by default ``[batch, first, second]``.
        shape: of the leaf.
        digits: of `value`, major first.

    Returns:
        The leaf.
    """
    digits = digits or (*part.batch, *part.first, *part.second)
    places = order(digits)
    value = value.reshape([d.size for d in digits])
    if backwards(digits):
        value = jnp.flip(value, backwards(digits))
    value = jnp.transpose(value, places)
    counts = [span([d for d in digits if d.axis == k]) for k in range(len(shape))]
    value = value.reshape(counts)
    if tuple(counts) == shape:
        return value
    pads = []
    for axis, size in enumerate(shape):
        found = np.sort(
            coordinates([digits[k] for k in places], axis, part.starts[axis])
        )
        steps = set(np.diff(found).tolist()) or {1}
        if len(steps) > 1:
            return _scattered(part, value, shape)
        step = steps.pop()
        pads.append((int(found[0]), size - 1 - int(found[-1]), step - 1))
    return lax.pad(value, jnp.zeros((), value.dtype), pads)


def _scattered(part: Part, value: Array, shape: tuple[int, ...]) -> Array:
    region = np.ix_(*_region(part, len(shape)))
    return jnp.zeros(shape, value.dtype).at[region].set(value)
