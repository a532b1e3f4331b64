"""Row lookups of a loss, found in its traced program, and the loss of a few rows alone.

A loss that reads a table as ``table[ids]`` and in no other way is a function of the
rows it looks up. Given some rows as an array of their own, `compact_loss` reads those
there and all others from the table as constants: value and derivative are those of the
loss, and no array of the table's size is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array

from dp_ilg.base import Example, LossFn, Params
from dp_ilg.clipping.bookkeeping.program import (
    constants,
    evaluate,
    flat,
    read,
    run,
    write,
)
from dp_ilg.clipping.bookkeeping.rules import within_rows
from dp_ilg.clipping.lookups.tables import Tables

Look = Callable[[int, Any, Sequence[Any]], Array]


class _View(NamedTuple):
    """A table, or what a cast has made of it."""

    table: int
    dtypes: tuple[Any, ...] = ()


def looked_up(loss_fn: LossFn, params: Params, batch: Example, tables: Tables) -> Array:
    """Which rows every example looks up.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        params: the parameters.
        batch: the examples, without sparse arrays.
        tables: of the parameters.

    Returns:
        int32 ``[batch, lookups]``: numbers of rows where all tables are counted as one;
        the number of all rows for a lookup outside of its table that reads none.

    Raises:
        ValueError: for a loss that reads a table otherwise, or not at all.

    Privacy: raw; `dp_ilg.clipping.lookups.counts` bounds what one example adds,
    whatever it looks up.

    Example:
        >>> from dp_ilg.clipping.lookups.tables import find_tables
        >>> params = {"table": jnp.ones((5, 2))}
        >>> loss = lambda p, ids: jnp.sum(p["table"][ids])
        >>> tables = find_tables(params, (("table", 3),))
        >>> looked_up(loss, params, jnp.array([[0, 3], [4, 4]]), tables).tolist()
        [[0, 3], [4, 4]]
    """
    sentinel = sum(table.rows for table in tables)

    def numbers(params: Params, example: Example) -> Array:
        found: list[Array] = []
        whole = jax.tree.leaves(params)

        def look(k: int, eqn: Any, values: Sequence[Any]) -> Array:
            ids = _ids(eqn, values, tables[k].rows).reshape(-1)
            inside = ids < tables[k].rows
            found.append(jnp.where(inside, ids + tables[k].start, sentinel))
            return evaluate(eqn, [whole[tables[k].leaf], *values])[0]

        closed, _ = _traced(loss_fn, params, example)
        _play(closed, [*whole, *jax.tree.leaves(example)], tables, look)
        return jnp.concatenate(found)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    alive = flat(jax.make_jaxpr(numbers)(params, shapes))
    leaves = jax.tree.leaves(params)
    return jax.vmap(lambda row: run(alive, [*leaves, *jax.tree.leaves(row)])[0])(batch)


def compact_loss(
    loss_fn: LossFn, params: Params, tables: Tables, slots: Sequence[Array]
) -> LossFn:
    """The loss as a function of the rows that take part, and of all other leaves.

    Args:
        loss_fn: ``(params, example) -> scalar``, or with auxiliary values beside it.
        params: all parameters; what is not kept is read here.
        tables: of the parameters.
        slots: for each table int32 ``[rows]``: a row's place among those that take
            part, `Table.most` for all others.

    Returns:
        The same loss for parameters in which each table has `Table.most` rows.

    Raises:
        ValueError: when called, for a loss that reads a table otherwise.

    Privacy: which rows take part must be public or released; the gradient then has no
    entry for any other row.

    Example:
        >>> from dp_ilg.clipping.lookups.tables import find_tables
        >>> params = {"table": jnp.arange(10.0).reshape(5, 2)}
        >>> loss = lambda p, ids: jnp.sum(p["table"][ids])
        >>> tables = find_tables(params, (("table", 1),))
        >>> few = compact_loss(loss, params, tables, [jnp.array([1, 1, 1, 0, 1])])
        >>> small = {"table": params["table"][3:4]}
        >>> jax.grad(few)(small, jnp.array([0, 3]))["table"].tolist()
        [[1.0, 1.0]]
    """
    whole = jax.tree.leaves(lax.stop_gradient(params))

    def loss(small: Params, example: Example) -> Any:
        own = jax.tree.leaves(small)

        def look(k: int, eqn: Any, values: Sequence[Any]) -> Array:
            table = tables[k]
            ids = _ids(eqn, values, table.rows)
            inside = jnp.clip(ids, 0, table.rows - 1)
            slot = jnp.where(ids < table.rows, slots[k][inside], table.most)
            near = _at(eqn, own[table.leaf], values, jnp.minimum(slot, table.most - 1))
            far = evaluate(eqn, [whole[table.leaf], *values])[0]
            return jnp.where(_spread(eqn, slot < table.most), near, far)

        closed, out = _traced(loss_fn, params, example)
        outs = _play(closed, [*own, *jax.tree.leaves(example)], tables, look)
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return loss


def _traced(loss_fn: LossFn, params: Params, example: Example) -> Any:
    closed, out = jax.make_jaxpr(loss_fn, return_shape=True)(params, example)
    return flat(closed), out


def _play(closed: Any, values: Sequence[Any], tables: Tables, look: Look) -> list[Any]:
    """Runs a program in which `look` answers every lookup in a table."""
    env: dict[Any, Any] = {}
    write(env, closed.jaxpr.constvars, constants(closed))
    write(env, closed.jaxpr.invars, values)
    views = {closed.jaxpr.invars[t.leaf]: _View(k) for k, t in enumerate(tables)}
    seen: set[int] = set()
    for eqn in closed.jaxpr.eqns:
        inputs = [None if isinstance(v, Literal) else views.get(v) for v in eqn.invars]
        view = next(filter(None, inputs), None)
        if view is None:
            given = [read(env, v) for v in eqn.invars]
            write(env, eqn.outvars, evaluate(eqn, given))
        elif eqn.primitive.name in ("convert_element_type", "copy"):
            (out,) = eqn.outvars
            views[out] = view._replace(dtypes=(*view.dtypes, out.aval.dtype))
        else:
            _check_lookup(eqn, inputs, tables)
            found = look(view.table, eqn, [read(env, v) for v in eqn.invars[1:]])
            for dtype in view.dtypes:
                found = found.astype(dtype)
            write(env, eqn.outvars, [found])
            seen.add(view.table)
    outs = [v for v in closed.jaxpr.outvars if not isinstance(v, Literal)]
    _check_seen(seen, [views[v].table for v in outs if v in views], tables)
    return [read(env, v) for v in closed.jaxpr.outvars]


def _check_lookup(eqn: Any, inputs: Sequence[Any], tables: Tables) -> None:
    """Raises for an equation that reads a table otherwise than by whole rows."""
    table = tables[next(view.table for view in inputs if view)]
    p, shape = eqn.params, tuple(eqn.invars[0].aval.shape)
    fits = inputs[0] is not None and not any(inputs[1:])
    name = eqn.primitive.name
    if fits and name == "gather":
        numbers = p["dimension_numbers"]
        axes = (tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims))
        fits = axes == ((0,), (0,)) and not numbers.operand_batching_dims
        fits = fits and tuple(p["slice_sizes"]) == (1, *shape[1:])
    elif fits and name == "dynamic_slice":
        fits = tuple(p["slice_sizes"]) == (1, *shape[1:])
    else:
        fits = False
    if not fits:
        raise ValueError(
            f"The loss reads {table.path} by {name}, but rows are kept only of a table "
            "that is looked up in, table[ids], along its first axis, outside of loops "
            "and branches; leave it out of tables."
        )


def _check_seen(seen: set[int], outs: list[int], tables: Tables) -> None:
    missing = [t.path for k, t in enumerate(tables) if k not in seen or k in outs]
    if missing:
        raise ValueError(
            f"The loss does not look up rows of {missing[0]}, or returns it whole; "
            "leave it out of tables."
        )


def _ids(eqn: Any, values: Sequence[Any], rows: int) -> Array:
    """The rows a lookup reads, without an axis of one; `rows` where it reads none."""
    ids = within_rows(values[0], rows)
    if eqn.primitive.name == "dynamic_slice":
        return jnp.clip(ids, 0, rows - 1)
    ids = ids.reshape(ids.shape[:-1])
    if "CLIP" in str(eqn.params["mode"]):
        return jnp.clip(ids, 0, rows - 1)
    return jnp.where(ids < 0, rows, ids)


def _at(eqn: Any, table: Array, values: Sequence[Any], slot: Array) -> Array:
    """What a lookup gives in another table, at other rows."""
    if eqn.primitive.name == "dynamic_slice":
        rest = [jnp.zeros((), slot.dtype) for _ in values[1:]]
        return lax.dynamic_slice(table, [slot, *rest], eqn.params["slice_sizes"])
    how = dict(eqn.params, mode=lax.GatherScatterMode.CLIP)
    return eqn.primitive.bind(table, slot[..., None], **how)


def _spread(eqn: Any, chosen: Array) -> Array:
    """One truth value a row looked up, broadcastable against the rows."""
    if eqn.primitive.name == "dynamic_slice":
        return chosen.reshape([1] * len(eqn.outvars[0].aval.shape))
    return jnp.expand_dims(chosen, eqn.params["dimension_numbers"].offset_dims)
