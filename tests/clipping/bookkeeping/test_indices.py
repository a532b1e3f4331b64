"""Row numbers of every integer type and mode give the gradient ``jax.grad`` gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.engine_table import ENGINES

WIDTH = 3
EDGES = [0, 1, 99, 100, 101, 127, 128, 255, 256, 299, 300, 301, 1000, 2**15]
EDGES += [2**16 - 1, 2**31 - 1]
EDGES += [2**31, 2**31 + 5, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
EDGES += [-1, -2, -100, -101, -128, -129, -300, -301, -1000, -(2**31), -(2**63)]
NARROW = ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
TYPES = [(name, False) for name in NARROW]
TYPES += [(name, True) for name in ("uint32", "int64", "uint64")]


def looked_up(mode):
    return lambda w, i: w.at[i].get(mode=mode)


FORMS = {
    **{f"get, {m}": looked_up(m) for m in ("clip", "fill", "promise_in_bounds")},
    "get, 0 elsewhere": lambda w, i: w.at[i].get(mode="fill", fill_value=0),
    "two of them": lambda w, i: w[jnp.stack([i, i])],
    "take, clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "take, fill": lambda w, i: jnp.take(w, i, axis=0, mode="fill"),
    "take, wrap": lambda w, i: jnp.take(w, i, axis=0, mode="wrap"),
    "plain": lambda w, i: w[i],
    "dynamic index": lambda w, i: jax.lax.dynamic_index_in_dim(w, i, 0, False),
    "dynamic slice": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1, 0),
    "column": lambda w, i: jax.lax.dynamic_index_in_dim(w.T, i, 1, False),
}


def number_of_rows(dtype):
    """As many as the type can count: beyond, JAX's own scatter loses rows."""
    return 100 if dtype.endswith("int8") else 300


def edges(dtype):
    bounds = np.iinfo(dtype)
    return np.array([x for x in EDGES if bounds.min <= x <= bounds.max], dtype)


@pytest.mark.parametrize(
    ("dtype", "wide"), TYPES, ids=[f"{d}{'-x64' * w}" for d, w in TYPES]
)
def test_rows_of_any_index_type_are_those_of_jax(dtype, wide):
    with jax.enable_x64(wide):
        ids, rng = edges(dtype), np.random.default_rng(0)
        shape = number_of_rows(dtype), WIDTH
        table = jnp.asarray(rng.normal(size=shape), jnp.float32)
        params = dict.fromkeys(FORMS, table)
        scale = jnp.asarray(rng.uniform(1, 2, len(ids)), jnp.float32)

        def loss(params, example):
            index, factor = example
            sums = [jnp.sum(f(params[name], index)) for name, f in FORMS.items()]
            return factor * sum(sums)

        groups = dp_ilg.Geometry.uniform(params, "leaf").groups
        weights = jnp.arange(1.0, 1 + len(ids), dtype=jnp.float32)

        @jax.jit
        def both(params, batch):
            found = ENGINES["bookkeeping"](loss, params, batch, groups)
            true = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
            norms = groups.batch_norms(jax.tree.leaves(true))
            sums = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), true)
            return (found.norms, found.weighted_sum(weights)), (norms, sums)

        got, wanted = both(params, (jnp.asarray(ids), scale))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), got, wanted
        )
        assert float(jnp.max(wanted[0])) > 1.0
