"""What a probe finds: lengths of gradients by group, and their spread along axes.

Sums over the gradients of made-up examples, micro-batch by micro-batch. From the
spread along the axes of a leaf follow the maps of the leaf (`dp_ilg.geometry.maps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg.base import Example, LossFn, Params
from dp_ilg.geometry.groups import Groups, LeafGroups, accumulator
from dp_ilg.geometry.maps import AxisMaps
from dp_ilg.geometry.rules import Rule
from dp_ilg.optimizers.public.axis_scale import axis_scale

NONE, VECTOR, MATRIX = "none", "vector", "matrix"
Kinds = tuple[tuple[str, ...], ...]


def group_kinds(leaf: LeafGroups, max_axis: int) -> tuple[str, ...]:
    """No map at all: one weight a group."""
    return (NONE,) * len(leaf.shape)


def diagonal_kinds(leaf: LeafGroups, max_axis: int) -> tuple[str, ...]:
    """A scale for every place of the last two axes: features, rows, channels."""
    last = range(len(leaf.shape) - 2, len(leaf.shape))
    found = [
        VECTOR if axis in last and n > 1 and leaf.groups else NONE
        for axis, n in enumerate(leaf.shape)
    ]
    return tuple(found)


def kronecker_kinds(leaf: LeafGroups, max_axis: int) -> tuple[str, ...]:
    """A matrix for the last two axes, as far as they are short and not cut."""
    found = diagonal_kinds(leaf, max_axis)
    cut = leaf.axis if len(set(leaf.groups)) > 1 else None
    pairs = enumerate(zip(found, leaf.shape, strict=True))
    turned = [
        MATRIX
        if kind == VECTOR and n <= max_axis and axis != cut and len(found) > 1
        else kind
        for axis, (kind, n) in pairs
    ]
    return tuple(turned)


DEPTHS: dict[str, Callable[[LeafGroups, int], tuple[str, ...]]] = {
    "group": group_kinds,
    "diagonal": diagonal_kinds,
    "kronecker": kronecker_kinds,
}


class Found(NamedTuple):
    """Means over the examples of a probe.

    Attributes:
        norms: mean length of the gradient, by group.
        squares: mean squared length, by group.
        spreads: for each leaf and axis None, the mean squared gradient of each slice,
            or the mean of ``G G^T`` with G the gradient unfolded along that axis.
    """

    norms: Array
    squares: Array
    spreads: Any


def probed(
    loss_fn: LossFn, params: Params, batch: Example, groups: Groups, how: tuple
) -> Found:
    """Means over the gradients of a synthetic batch.

    Args:
        loss_fn: ``(params, example) -> scalar``, or a pair that begins with it.
        params: where.
        batch: made-up examples.
        groups: of the parameters.
        how: the kinds of all leaves (`Kinds`), the examples differentiated at once,
            and maps to enter before lengths are taken, or None.

    Returns:
        The `Found`. An example whose gradient is not finite counts as none.

    Example:
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"w": jnp.ones(2)}
        >>> rows, groups = jnp.array([[3.0, 4.0]]), group(params)
        >>> found = probed(lambda p, x: p["w"] @ x, params, rows, groups,
        ...     (((VECTOR,),), 1, None))
        >>> found.norms.round(3).tolist(), found.spreads[0][0].tolist()
        ([5.0], [9.0, 16.0])
    """
    kinds, at_once, maps = how
    size = jax.tree.leaves(batch)[0].shape[0]

    def value(params: Params, example: Example) -> Array:
        return jax.tree.leaves(loss_fn(params, example))[0]

    def of_chunk(rows: Example) -> Found:
        found = jax.vmap(jax.grad(value), (None, 0))(params, rows)
        leaves = [x.astype(accumulator(x.dtype)) for x in jax.tree.leaves(found)]
        return _summed(_finite(leaves), groups, kinds, maps)

    split = lambda x: x.reshape(size // at_once, at_once, *x.shape[1:])  # noqa: E731
    chunks = jax.tree.map(split, batch)
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(of_chunk, jax.tree.map(lambda x: x[0], chunks)),
    )

    def body(total: Found, rows: Example) -> tuple[Found, None]:
        return jax.tree.map(jnp.add, total, of_chunk(rows)), None

    total, _ = jax.lax.scan(body, start, chunks)
    return jax.tree.map(lambda x: x / size, total)


def _finite(leaves: list[Array]) -> list[Array]:
    """Zeros in place of an example with an entry that is no finite number."""
    fine = jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in leaves]).all(
        0
    )
    rows = [fine.reshape(-1, *[1] * (x.ndim - 1)) for x in leaves]
    return [jnp.where(row, x, 0) for row, x in zip(rows, leaves, strict=True)]


def _summed(leaves: list[Array], groups: Groups, kinds: Kinds, maps: Any) -> Found:
    inside = leaves if maps is None else maps.entered(leaves)
    norms = groups.batch_norms(inside).astype(jnp.float32)
    spreads = tuple(
        tuple(_spread(leaf, axis, kind) for axis, kind in enumerate(own))
        for leaf, own in zip(leaves, kinds, strict=True)
    )
    return Found(norms.sum(0), jnp.square(norms).sum(0), spreads)


def _spread(leaf: Array, axis: int, kind: str) -> Array | None:
    """The sum over a chunk along one axis; the first axis of `leaf` is the batch."""
    if kind == NONE:
        return None
    rows = jnp.moveaxis(leaf, axis + 1, 0).reshape(leaf.shape[axis + 1], -1)
    if kind == VECTOR:
        return jnp.sum(jnp.square(rows), axis=1)
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def maps_of(
    found: Found, groups: Groups, rule: Rule, damping: Any, whitened: bool
) -> AxisMaps:
    """The maps that follow from what a probe found.

    A slice, or an eigenvector of ``G G^T``, with the mean squared gradient s has the
    importance ``sqrt(s)``; the rule makes its scale of it, see `axis_scale`.

    Args:
        found: of the probe.
        groups: of the parameters.
        rule: from importance to scale.
        damping: added to every s, as a part of their mean.
        whitened: of the `AxisMaps`.

    Returns:
        The maps.

    Example:
        >>> from dp_ilg.geometry.layers import group
        >>> from dp_ilg.geometry.rules import RULES
        >>> found = Found(None, None, ((jnp.array([1.0, 9.0]),),))
        >>> maps = maps_of(found, group({"w": jnp.ones(2)}), RULES["paper"], 0.0, False)
        >>> bool(jnp.allclose(maps.back[0][0], maps.back[0][0][0] * jnp.array([1, 3])))
        True
    """
    pairs = [
        [_factors(x, leaf.shape, axis, rule, damping) for axis, x in enumerate(own)]
        for leaf, own in zip(groups.leaves, found.spreads, strict=True)
    ]
    into, back = (tuple(tuple(p[k] for p in own) for own in pairs) for k in (0, 1))
    return AxisMaps(into, back, whitened)


def _factors(
    spread: Any, shape: tuple[int, ...], axis: int, rule: Rule, damping: Any
) -> tuple[Any, Any]:
    """``L^-1`` and L along one axis."""
    if spread is None:
        return None, None
    entries = 1
    for other, n in enumerate(shape):
        entries *= 1 if other == axis else n
    if spread.ndim == 1:
        scale = axis_scale(rule, spread, entries, damping)
        return (1 / scale).astype(jnp.float32), scale.astype(jnp.float32)
    mean = jnp.trace(spread) / len(spread)
    known = jnp.isfinite(mean) & (mean > 0)
    even = jnp.eye(len(spread), dtype=spread.dtype)
    plain = jnp.where(known, spread / jnp.where(known, mean, 1), even)
    values, turn = jnp.linalg.eigh((plain + plain.T) / 2)
    scale = axis_scale(rule, values, entries, damping)
    both = ((turn * x) @ turn.T for x in (1 / scale, scale))
    into, back = (x.astype(jnp.float32) for x in both)
    return into, back
