"""Maps of leaves on the factors of a part, and on its gradients where they are formed.

What comes out are the *terms* of an example from there on: its norm, its sum and the
bounds on their rounding are made of them (docs/rounding.md, "Mapped leaves").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping.factors import Factors, gradients
from dp_ilg.clipping.bookkeeping.parts import Part
from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.clipping.mapping.placement import Placement
from dp_ilg.geometry.groups import nonzero
from dp_ilg.geometry.maps import along
from dp_ilg.geometry.rounding import power_of_two

ROUNDINGS = 3
"""Roundings by which norms of mapped factors are raised: a device may fuse the product
with a scale, one a factor, into what follows, for the norm or for the sum alone."""


class FactorMap(NamedTuple):
    """What acts on one factor.

    Attributes:
        scale: ``[blocks or 1, entries]``, or None.
        matrices: how the entries lie, and the matrix.
    """

    scale: Any
    matrices: tuple[tuple[tuple[int, int, int], Array], ...]

    def turned(self, value: Array, axis: int) -> Array:
        """The matrices along one axis of an array."""
        for lying, matrix in self.matrices:
            shape = value.shape
            split = value.reshape(*shape[:axis], *lying, *shape[axis + 1 :])
            value = along(split, matrix, axis + 1).reshape(shape)
        return value


class Acting(NamedTuple):
    """The map of one part.

    Attributes:
        first: what acts on the first factor.
        second: on the second.
        unit: a power of two, by which the product has still to be multiplied.
    """

    first: FactorMap
    second: FactorMap
    unit: Array


def acting(placed: Placement, factors: Any) -> Acting:
    """The arrays that act on a part, scaled against over- and underflow.

    Args:
        placed: where the map acts.
        factors: of the leaf, as in `dp_ilg.geometry.maps.AxisMaps`.

    Returns:
        The `Acting`.
    """
    unit: Array = jnp.ones((), jnp.float32)
    scaled: list[Any] = []
    for factor in factors:
        if factor is None:
            scaled.append(None)
            continue
        value = jnp.asarray(factor, jnp.float32)
        top = nonzero(power_of_two(jnp.max(jnp.abs(value))))
        scaled.append(value / top)
        unit = unit * top
    one, two = (_on(name, placed, scaled) for name in ("first", "second"))
    return Acting(one, two, unit)


Acts = dict[int, Acting]


def of_parts(parts: list[Part], maps: dict[int, Placement], coordinates: Any) -> Acts:
    """The maps of parts, by part.

    Args:
        parts: all of them.
        maps: where maps act, by part.
        coordinates: `dp_ilg.geometry.maps.AxisMaps`, or anything where `maps` is empty.

    Returns:
        The `Acting` of every part that is mapped.
    """
    return {k: acting(own, coordinates.into[parts[k].leaf]) for k, own in maps.items()}


def _on(name: str, placed: Placement, factors: list[Any]) -> FactorMap:
    scale = None
    for own in placed.scales:
        if own.factor == name:
            found = factors[own.axis].reshape(-1)[own.places]
            scale = found if scale is None else scale * found
    matrices = [
        (turn.lying, factors[turn.axis])
        for turn in placed.matrices
        if turn.factor == name
    ]
    return FactorMap(scale, tuple(matrices))


def on_factors(own: Acting, factors: Factors) -> Factors:
    """The factors of the mapped gradient."""
    pairs = zip(factors.firsts, factors.seconds, strict=True)
    made = [_on_pair(own, *pair) for pair in pairs]
    return Factors([one for one, _ in made], [two for _, two in made])


def _on_pair(own: Acting, first: Any, second: Any) -> tuple[Any, Any]:
    values, extra = [first, second], [None, None]
    for k, act in enumerate((own.first, own.second)):
        value = values[k]
        if isinstance(value, Rows):
            extra[1 - k] = _of_rows(act.scale, value)
        else:
            turned = act.turned(value, 3)
            scale = None if act.scale is None else act.scale[None, :, None]
            values[k] = _times(turned, scale)
    return _times(values[0], extra[0]), _times(values[1], extra[1])


def _of_rows(scale: Any, rows: Rows) -> Any:
    """The scale of each term's row, ``[examples, blocks, terms, 1]``."""
    if scale is None:
        return None
    blocks = np.arange(scale.shape[0])[None, :, None]
    return scale[blocks, rows.ids][..., None]


def _times(value: Any, scale: Any) -> Any:
    return value if scale is None else value * scale.astype(value.dtype)


def formed(own: Acting, part: Part, factors: Factors) -> Array:
    """The mapped gradients ``[examples, blocks, first, second]``: factors or they."""
    if part.terms <= min(part.shape[1:]):
        return gradients(on_factors(own, factors))
    return on_formed(own, gradients(factors))


def on_formed(own: Acting, value: Array) -> Array:
    """The mapped gradients from gradients in the part's shape."""
    value = own.second.turned(own.first.turned(value, 2), 3)
    one, two = own.first.scale, own.second.scale
    value = _times(value, None if one is None else one[None, :, :, None])
    return _times(value, None if two is None else two[None, :, None, :])


def enlarged(scale: Array, acts: Acts) -> Array:
    """The scales of all parts with the maps' units: NaN if too large, 0 if too small.

    Args:
        scale: ``[examples, parts]``.
        acts: the maps by part.

    Returns:
        The scales.
    """
    one = jnp.ones((), scale.dtype)
    units = [acts[k].unit if k in acts else one for k in range(scale.shape[1])]
    found = scale * jnp.stack(units).astype(scale.dtype)
    tiny = jnp.finfo(found.dtype).tiny
    known = jnp.where(found * tiny < 1, found, jnp.nan)
    return jnp.where(found < tiny, 0, known)
