"""Any transformation behind the noise: what it keeps of dropped groups stands still."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg.geometry.geometry import Geometry


def hold_still(
    geometry: Geometry, updates: Any, state: Any, before: Any
) -> tuple[Any, Any]:
    """Updates of 0, and the state of before, in the groups that a step dropped.

    Whatever in a state has the structure and shapes of the parameters (momentum, second
    moments, averages) is held entry by entry. Counters and what is factored or shared
    by groups go on: an optimizer of Optax corrects a group that comes back for all
    steps of the run. `dp_ilg.optimizers.dropped.adam` does better for Adam.

    Args:
        geometry: of the step.
        updates: of a transformation behind the noise.
        state: of it, after the step.
        before: the same before the step.

    Returns:
        Both, as they are where the geometry drops no groups.

    Privacy: post-processing; which groups are dropped is public.

    Example:
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
        >>> there = Geometry(jnp.array([1.0, 0.0]), group(params), drops=True)
        >>> old = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        >>> updates, state = hold_still(there, params, (3, params), (2, old))
        >>> state[0], [x.item() for x in jax.tree.leaves((updates, state[1]))]
        (3, [1.0, 0.0, 1.0, 0.0])
    """
    if not geometry.drops:
        return updates, state
    treedef, shapes = jax.tree.structure(updates), _shapes(geometry)
    if treedef.num_leaves != len(shapes):
        return updates, state
    kept = jax.tree.unflatten(treedef, geometry.kept_leaves())

    def alike(tree: Any) -> bool:
        return (
            jax.tree.structure(tree) == treedef
            and [jnp.shape(x) for x in jax.tree.leaves(tree)] == shapes
        )

    def held(new: Any, old: Any) -> Any:
        return jax.tree.map(_chosen, kept, new, old) if alike(new) else new

    zeros = jax.tree.map(jnp.zeros_like, updates)
    moved = jax.tree.map(held, state, before, is_leaf=alike)
    return jax.tree.map(_chosen, kept, updates, zeros), moved


def _shapes(geometry: Geometry) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in geometry.groups.leaves]


def _chosen(kept: Array, new: Any, old: Any) -> Any:
    return jnp.where(kept, new, old)
