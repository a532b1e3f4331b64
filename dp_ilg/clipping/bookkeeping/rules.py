"""Rules: how the gradient of a parameter factors in the equations that read it.

Every rule writes the gradient of one example as ``sum_t first_t x second_t``: two
factors with an axis of terms t, made of what the equation read beside the parameter
and of the derivative at its output. Equations without a rule are not errors; their
parameters take the general path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping import phases
from dp_ilg.clipping.bookkeeping.convolution import Convolution
from dp_ilg.clipping.bookkeeping.views import (
    Digits,
    Held,
    View,
    backwards,
    merged,
    regroup,
    span,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A one-hot factor, kept as row numbers ``[batch, terms]`` of `size` rows."""

    ids: Any
    size: int = dataclasses.field(metadata={"static": True})


class Direct(NamedTuple):
    """A faster way to a gradient than by its factors, in a layout of its own.

    Attributes:
        make: maps what `Linear.factors` does to the gradient, in any shape.
        digits: of what is made, major first.
    """

    make: Callable[..., Array]
    digits: Digits


class Linear(NamedTuple):
    """How an equation is linear in one operand.

    Attributes:
        batch: digits over which the equation is one independent map each.
        first: digits of the first factor.
        second: digits of the second factor.
        terms: number of terms t for one example, enclosing loops aside.
        reads: the operand that `factors` needs.
        factors: maps that operand and the output's derivative to the factors
            ``[batch, terms, first]`` (or `Rows`) and ``[batch, terms, second]``.
        apply: evaluates the equation faster than its primitive, or None.
        is_rows: whether the first factor is `Rows`.
        direct: forms the gradient itself, where there is a faster way than by the
            factors.
    """

    batch: Digits
    first: Digits
    second: Digits
    terms: int
    reads: int
    factors: Callable[..., tuple[Any, Array]]
    apply: Callable[..., Array] | None = None
    is_rows: bool = False
    direct: Direct | None = None


Rule = Callable[[Any, int, View], "Linear | str"]
Found = list[tuple[View, Linear]]


def linear_in(eqn: Any, position: int, held: Held) -> Found | str:
    """How an equation is linear in every view that one operand holds.

    Args:
        eqn: the equation.
        position: of the operand.
        held: what the operand holds.

    Returns:
        The views with their `Linear`, or why there is no rule.
    """
    name = eqn.primitive.name
    if name not in RULES:
        return name
    if isinstance(held, View):
        linear = RULES[name](eqn, position, held)
        return linear if isinstance(linear, str) else [(held, linear)]
    cut = _CUTS[name](eqn, position, held.axis) if name in _CUTS else None
    if cut is None:
        return f"{name} after concatenate"
    found, start = [], 0
    for size, view in held.pieces:
        if view is not None and size:
            linear = cut.linear(eqn, position, view, held.axis, start, size)
            if isinstance(linear, str):
                return linear
            found.append((view, linear))
        start += size
    return found


class Cut(NamedTuple):
    """The axis that goes with a cut of one operand.

    Attributes:
        operand: of the equation's other operand, else of its output.
        axis: the axis.
    """

    operand: bool
    axis: int

    def linear(
        self, eqn: Any, position: int, view: View, along: int, start: int, size: int
    ) -> Linear | str:
        """How the equation is linear in `size` entries of an operand's axis."""
        shapes = [list(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)]
        shapes[position][along] = size
        place = 1 - position if self.operand else 2
        shapes[place][self.axis] = size
        dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
        given = [
            SimpleNamespace(aval=jax.ShapeDtypeStruct(shape, dtype))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        alone = SimpleNamespace(
            primitive=eqn.primitive,
            params=eqn.params,
            invars=given[:2],
            outvars=given[2:],
        )
        linear = RULES[eqn.primitive.name](alone, position, view)
        if isinstance(linear, str):
            return linear
        direct = linear.direct
        if direct is not None:
            direct = direct._replace(make=self._of_cut(direct.make, start, size))
        make = self._of_cut(linear.factors, start, size)
        return linear._replace(factors=make, apply=None, direct=direct)

    def _of_cut(self, make: Callable[..., Any], start: int, size: int) -> Any:
        def cut(x: Array) -> Array:
            return jax.lax.slice_in_dim(x, start, start + size, axis=self.axis)

        if self.operand:
            return lambda x, cotangent: make(cut(x), cotangent)
        return lambda x, cotangent: make(x, cut(cotangent))


def _cut_dot(eqn: Any, position: int, axis: int) -> Cut | None:
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - position
    if axis in contract[position]:
        return Cut(True, contract[other][tuple(contract[position]).index(axis)])
    if axis in batch[position]:
        return None
    before = len(_free(eqn, 0, contract, batch)) if position == 1 else 0
    own = _free(eqn, position, contract, batch).index(axis)
    return Cut(False, len(batch[0]) + before + own)


def _cut_convolution(eqn: Any, position: int, axis: int) -> Cut | None:
    numbers = eqn.params["dimension_numbers"]
    if position != 1 or eqn.params["feature_group_count"] != 1:
        return None
    if axis == numbers.rhs_spec[0]:
        return Cut(False, numbers.out_spec[1])
    return Cut(True, numbers.lhs_spec[1]) if axis == numbers.rhs_spec[1] else None


def _join(view: View, axes: Any) -> Digits:
    return tuple(d for k in axes for d in view.axes[k])


def _dot_general(eqn: Any, position: int, view: View) -> Linear | str:
    """``dot_general``: contracted axes against free ones, batch axes apart."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - position
    own_free = _free(eqn, position, contract, batch)
    free = _free(eqn, other, contract, batch)
    shape = eqn.invars[other].aval.shape
    blocks = math.prod(shape[k] for k in batch[other])
    terms = math.prod(shape[k] for k in free)
    first = _join(view, contract[position])
    second = _join(view, own_free)

    def factors(x: Array, cotangent: Array) -> tuple[Array, Array]:
        x = jnp.transpose(x, (*batch[other], *free, *contract[other]))
        if position == 0:
            start, middle = len(batch[0]), len(own_free)
            order = list(range(cotangent.ndim))
            head, own = order[:start], order[start : start + middle]
            cotangent = jnp.transpose(
                cotangent, (*head, *order[start + middle :], *own)
            )
        return (
            x.reshape(blocks, terms, span(first)),
            cotangent.reshape(blocks, terms, span(second)),
        )

    joined = _join(view, batch[position])
    return Linear(joined, first, second, terms, other, factors)


def _free(eqn: Any, position: int, contract: Any, batch: Any) -> tuple[int, ...]:
    taken = {*contract[position], *batch[position]}
    return tuple(
        k for k in range(len(eqn.invars[position].aval.shape)) if k not in taken
    )


def _conv_general_dilated(eqn: Any, position: int, view: View) -> Linear | str:
    """Convolutions of any rank, stride, dilation and number of groups."""
    if position != 1:
        return "a convolution whose input, not kernel, is the parameter"
    if eqn.params["batch_group_count"] != 1:
        return "a convolution with batch groups"
    conv = Convolution.of(eqn)
    out, into, *spatial = conv.rhs_spec
    width = eqn.invars[1].aval.shape[out] // conv.groups
    split = regroup(view.axes[out], (conv.groups, width))
    if split is None:
        return "a grouped convolution of a reshaped kernel"
    shape = eqn.outvars[0].aval.shape
    terms = math.prod(shape) // shape[conv.out_spec[1]]
    first = _join(view, (*spatial, into))

    def factors(x: Array, cotangent: Array) -> tuple[Array, Array]:
        seen = conv.patches(conv.channels_last(x, conv.lhs_spec))
        seen = seen.reshape(terms, math.prod(conv.kernel), conv.groups, -1)
        seen = jnp.moveaxis(seen, 2, 0)
        given = conv.channels_last(cotangent, conv.out_spec)
        given = jnp.moveaxis(given.reshape(terms, conv.groups, width), 1, 0)
        return seen.reshape(conv.groups, terms, span(first)), given

    def shifted(x: Array, cotangent: Array) -> Array:
        seen = conv.channels_last(x, conv.lhs_spec)
        given = conv.channels_last(cotangent, conv.out_spec)
        return conv.kernel_gradient(seen, given)

    def unphased(x: Array, cotangent: Array) -> Array:
        seen = conv.channels_last(x, conv.lhs_spec)
        given = conv.channels_last(cotangent, conv.out_spec)
        return phases.kernel_gradient(conv, seen, given)

    lying = (*_join(view, (*spatial[1:], into, *spatial[:1])), *split[1])
    direct = Direct(shifted, lying) if conv.shifts else None
    if phases.pays(conv, eqn.invars[1].aval.shape[into]):
        direct = Direct(unphased, (*first, *split[1]))
    return Linear(
        split[0], first, split[1], terms, 0, factors, conv.apply, False, direct
    )


def _gather(eqn: Any, position: int, view: View) -> Linear | str:
    """Rows of an embedding: the first factor is one-hot."""
    p = eqn.params
    numbers, shape = p["dimension_numbers"], eqn.invars[0].aval.shape
    axes = numbers.start_index_map
    sizes = tuple(n for k, n in enumerate(shape) if k not in axes)
    rows = len(axes) == 1 and tuple(numbers.collapsed_slice_dims) == tuple(axes)
    kept = tuple(n for k, n in enumerate(p["slice_sizes"]) if k not in axes)
    if position != 0 or not rows or numbers.operand_batching_dims or kept != sizes:
        return "an indexing that is not of whole rows along one axis"
    (axis,) = axes
    others = [k for k in range(len(shape)) if k != axis]
    first, second = _join(view, (axis,)), _join(view, others)
    if len(merged(first)) > 1 or backwards(first):
        return "rows that are not neighbours in the parameter"
    terms = math.prod(eqn.invars[1].aval.shape[:-1])
    rank = len(eqn.outvars[0].aval.shape)
    outer = [k for k in range(rank) if k not in numbers.offset_dims]
    clips = "CLIP" in str(p["mode"])

    def factors(indices: Array, cotangent: Array) -> tuple[Rows, Array]:
        ids = within_rows(indices, shape[axis]).reshape(1, terms)
        given = jnp.transpose(cotangent, (*outer, *numbers.offset_dims))
        given = given.reshape(1, terms, span(second))
        if not clips:
            inside = (ids >= 0) & (ids < shape[axis])
            given = jnp.where(inside[..., None], given, 0)
        return Rows(_clipped(ids, shape[axis]), shape[axis]), given

    return Linear((), first, second, terms, 1, factors, None, True)


def _dynamic_slice(eqn: Any, position: int, view: View) -> Linear | str:
    """One row at a place that data decides."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    cut = [k for k, (n, m) in enumerate(zip(shape, sizes, strict=True)) if n != m]
    if position != 0 or len(cut) != 1 or sizes[cut[0]] != 1:
        return "a slice at a traced place that is not one whole row"
    (axis,) = cut
    others = [k for k in range(len(shape)) if k != axis]
    first, second = _join(view, (axis,)), _join(view, others)
    if len(merged(first)) > 1 or backwards(first):
        return "rows that are not neighbours in the parameter"

    def factors(index: Array, cotangent: Array) -> tuple[Rows, Array]:
        ids = _clipped(within_rows(index, shape[axis]).reshape(1, 1), shape[axis])
        return Rows(ids, shape[axis]), cotangent.reshape(1, 1, span(second))

    return Linear((), first, second, 1, 1 + axis, factors, None, True)


def within_rows(ids: Array, size: int) -> Array:
    """Row numbers as int32, those outside of the rows as -1 or `size`.

    Bounded in the ids' own type: a cast alone would make a large unsigned number
    negative, and a wide one any number.
    """
    most = min(size, jnp.iinfo(ids.dtype).max)
    least = max(-1, jnp.iinfo(ids.dtype).min)
    low, high = (jnp.asarray(x, ids.dtype) for x in (least, most))
    return jnp.clip(ids, low, high).astype(jnp.int32)


def _clipped(ids: Array, size: int) -> Array:
    """Row numbers within the rows there are."""
    return jnp.clip(ids, 0, size - 1)


RULES: dict[str, Rule] = {
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}
_CUTS: dict[str, Callable[[Any, int, int], Cut | None]] = {
    "conv_general_dilated": _cut_convolution,
    "dot_general": _cut_dot,
}
