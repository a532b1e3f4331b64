"""Meshes with explicit axes, where every array's type says how it is sharded.

An engine contracts over examples and fills micro-batches up, which such types refuse
wherever the result's sharding would be ambiguous. So XLA places what is in between, and
the sum comes out sharded as the parameters are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from dp_ilg.base import ClippedGrad, Params


def placed_by_xla(
    function: Callable[..., ClippedGrad], params: Params
) -> Callable[..., ClippedGrad]:
    """A clipped sum whose axes are automatic inside, on a mesh where they are not.

    Args:
        function: ``(*arrays) -> ClippedGrad``.
        params: the gradients are sharded as these, all else is on every device.

    Returns:
        The same function; itself where no axis of the mesh in use is explicit.

    Example:
        >>> function = lambda x: x
        >>> placed_by_xla(function, {}) is function
        True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return function
    specs = [_spec(x) for x in jax.tree.leaves(params)]

    def parts(*args: Any) -> Any:
        found = function(*args)
        rest = dataclasses.replace(found, gradients=None)
        return jax.tree.leaves(found.gradients), rest

    def call(*args: Any) -> ClippedGrad:
        inside: Any = jax.sharding.auto_axes(
            parts, out_sharding=(specs, PartitionSpec())
        )
        leaves, rest = inside(*args)
        sums = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return dataclasses.replace(rest, gradients=sums)

    return call


def _spec(value: Any) -> PartitionSpec:
    return getattr(jax.typeof(value).sharding, "spec", PartitionSpec())
