"""An optimizer's state between steps, for all rows, and in a step, for the kept ones.

The optimizer is made for parameters in which a table has its kept rows alone. What it
keeps a row (Adam's moments) is stored for all rows; a step reads and writes the rows
that take part, so that a row which does not is as it was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.base import Params
from dp_ilg.clipping.lookups.tables import Tables
from dp_ilg.optimizers.kept_rows.release import gathered, narrow, widen

Owners = tuple[int | None, ...]


def owners_of(init: Any, params: Params, tables: Tables) -> tuple[Owners, Any]:
    """Which leaves of a state have one entry a row of a table, and the state's tree.

    Found by changing the number of rows: what changes with it belongs to the table.

    Args:
        init: of the optimizer.
        params: all parameters; only shapes are read.
        tables: of the parameters.

    Returns:
        For every leaf of the state the number of its table, or None; and the tree of a
        state for kept rows.

    Raises:
        ValueError: for a state whose tables are not rows along the first axis.

    Example:
        >>> import optax
        >>> from dp_ilg.clipping.lookups.tables import find_tables
        >>> params = {"table": jnp.zeros((9, 2)), "w": jnp.zeros(3)}
        >>> tables = find_tables(params, (("table", 4),))
        >>> owners_of(optax.sgd(0.1, momentum=0.9).init, params, tables)[0]
        (0, None)
    """
    sizes = [table.most for table in tables]
    base = jax.eval_shape(init, resized(params, tables, sizes))
    shapes = [leaf.shape for leaf in jax.tree.leaves(base)]
    owners: list[int | None] = [None] * len(shapes)
    for k in range(len(tables)):
        more = [size + (other == k) for other, size in enumerate(sizes)]
        grown = jax.eval_shape(init, resized(params, tables, more))
        for place, leaf in enumerate(jax.tree.leaves(grown)):
            if leaf.shape != shapes[place]:
                wanted = (more[k], *shapes[place][1:])
                _check(leaf.shape, wanted, owners[place], tables[k].path)
                owners[place] = k
    return tuple(owners), jax.tree.structure(base)


def _check(shape: Any, wanted: Any, owner: int | None, path: str) -> None:
    if shape != wanted or owner is not None:
        raise ValueError(
            f"The optimizer keeps an array of shape {shape} for {path}, which is not "
            "one entry a row; take one that treats rows alone, such as optax.adam."
        )


def resized(params: Params, tables: Tables, sizes: Sequence[int]) -> Params:
    """Shapes of the parameters with another number of rows in each table."""
    leaves, treedef = jax.tree.flatten(params)
    found = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    for table, size in zip(tables, sizes, strict=True):
        old = found[table.leaf]
        found[table.leaf] = jax.ShapeDtypeStruct((size, *old.shape[1:]), old.dtype)
    return jax.tree.unflatten(treedef, found)


def compact_params(params: Params, tables: Tables, ids: Sequence[Any]) -> Params:
    """Parameters in which every table has its kept rows alone.

    Example:
        >>> from dp_ilg.clipping.lookups.tables import find_tables
        >>> params = {"table": jnp.arange(3.0)[:, None]}
        >>> tables = find_tables(params, (("table", 1),))
        >>> compact_params(params, tables, [jnp.array([2])])["table"].tolist()
        [[2.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    for table, kept in zip(tables, ids, strict=True):
        leaves[table.leaf] = gathered(leaves[table.leaf], kept)
    return jax.tree.unflatten(treedef, leaves)


def first_state(init: Any, params: Params, tables: Tables) -> Any:
    """The state before the first step: that of kept rows, its tables for all rows.

    Args:
        init: of the optimizer.
        params: all parameters.
        tables: of the parameters.

    Returns:
        A state in the tree of one for kept rows.
    """
    owners, treedef = owners_of(init, params, tables)
    ids = [jnp.arange(table.most, dtype=jnp.int32) for table in tables]
    small = jax.tree.leaves(init(compact_params(params, tables, ids)))
    if all(k is None for k in owners):
        return jax.tree.unflatten(treedef, small)
    whole = jax.tree.leaves(init(params))
    leaves = [
        one if k is None else other
        for one, other, k in zip(small, whole, owners, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def narrowed(state: Any, owners: Owners, ids: Sequence[Any]) -> Any:
    """A stored state for the rows of a step.

    Example:
        >>> narrowed({"mu": jnp.eye(3)}, (0,), [jnp.array([1])])["mu"].tolist()
        [[0.0, 1.0, 0.0]]
    """
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, narrow(leaves, owners, ids))


def widened(state: Any, small: Any, owners: Owners, ids: Sequence[Any]) -> Any:
    """The stored state after a step on some rows.

    Example:
        >>> ids = [jnp.array([1])]
        >>> state, small = {"mu": jnp.zeros((3, 1))}, {"mu": jnp.ones((1, 1))}
        >>> widened(state, small, (0,), ids)["mu"].ravel().tolist()
        [0.0, 1.0, 0.0]
    """
    leaves, treedef = jax.tree.flatten(state)
    found = widen(leaves, jax.tree.leaves(small), owners, ids)
    return jax.tree.unflatten(treedef, found)
