"""The engine's maximum pooling against JAX's own, ties, padding and NaN included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dp_ilg
from dp_ilg.clipping.bookkeeping.max_pooling import pooling
from dp_ilg.clipping.engine_table import ENGINES

NONE = (0, 0)
WINDOWS: dict[str, Any] = {
    "overlapping": ((7, 9, 3), (2, 2, 1), (1, 1, 1), (NONE, NONE, NONE)),
    "apart": ((8, 6, 2), (2, 2, 1), (2, 2, 1), (NONE, NONE, NONE)),
    "uneven": ((9, 8, 2), (3, 2, 1), (2, 3, 1), ((1, 1), (0, 1), NONE)),
    "stem of a ResNet": ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "one axis": ((10,), (4,), (3,), (NONE,)),
}


def plain(name):
    _, sizes, strides, padding = WINDOWS[name]
    return lambda x: lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, padding)


def faster(f, x) -> Any:
    (equation,) = jax.make_jaxpr(f)(x).jaxpr.eqns
    return pooling(equation)


@pytest.mark.parametrize("name", WINDOWS)
def test_value_and_derivative_are_those_of_jax(name):
    f, shape = plain(name), WINDOWS[name][0]
    rows = jnp.round(jax.random.normal(jax.random.key(0), (5, *shape)))
    x = jax.nn.relu(rows)  # most windows hold ties
    g = faster(f, x[0])
    want, pull = jax.vjp(jax.vmap(f), x)
    got, own_pull = jax.vjp(jax.vmap(g), x)
    cotangent = jax.random.normal(jax.random.key(1), want.shape)
    assert jnp.array_equal(got, want)
    (own,), (theirs,) = own_pull(cotangent), pull(cotangent)
    assert np.allclose(own, theirs, atol=1e-6)
    last_wins = jnp.flip(jax.vjp(jax.vmap(g), jnp.flip(x))[1](jnp.flip(cotangent))[0])
    assert name == "stem of a ResNet" or not np.allclose(last_wins, theirs, atol=1e-3)


def test_nan_stays_in_its_windows():
    x = jnp.zeros((6, 6)).at[2, 2].set(jnp.nan)
    f = lambda x: lax.reduce_window(  # noqa: E731
        x, -jnp.inf, lax.max, (2, 2), (2, 2), (NONE, NONE)
    )
    assert np.isnan(faster(f, x)(x)).tolist() == np.isnan(f(x)).tolist()


@pytest.mark.parametrize(
    "x, sizes, facts",
    [
        (jnp.ones((9, 9)), (5, 5), {}),
        (jnp.ones((9, 9)), (1, 1), {}),
        (jnp.ones((9, 9)), (2, 2), {"base_dilation": (2, 1)}),
        (jnp.ones((9, 9)), (2, 2), {"window_dilation": (2, 1)}),
        (jnp.ones((9, 9), int), (2, 2), {}),
        (jnp.ones((1, 9)), (2, 2), {}),
    ],
    ids=["large", "single", "dilated input", "dilated window", "whole", "empty"],
)
def test_what_it_leaves_to_jax(x, sizes, facts):
    f = lambda x: lax.reduce_window_max_p.bind(  # noqa: E731
        x,
        window_dimensions=sizes,
        window_strides=(1, 1),
        padding=(NONE, NONE),
        **{"base_dilation": (1, 1), "window_dilation": (1, 1)} | facts,
    )
    assert faster(f, x) is None


def test_the_engine_takes_it():
    f = plain("apart")
    loss = lambda p, x: jnp.sum(f(p["w"] * x) ** 2)  # noqa: E731
    params = {"w": jnp.ones(2)}
    geometry = dp_ilg.Geometry.uniform(params)

    def program(engine):
        grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, engine=engine)
        run = lambda rows: grad_fn(params, rows, geometry=geometry)  # noqa: E731
        return str(jax.make_jaxpr(run)(jnp.ones((3, 8, 6, 2))))

    assert "select_and_scatter" in program("vmap")
    assert "select_and_scatter" not in program("bookkeeping")


@pytest.mark.parametrize(
    "engine, count, asked, turns",
    [
        ("bookkeeping", 8, False, 2),
        ("bookkeeping", 9, False, 1),
        ("bookkeeping", 4, False, 1),
        ("bookkeeping", 8, True, 1),
        ("vmap", 8, True, 8),
        ("vmap", 17, True, 1),
    ],
)
def test_micro_batches_written_out(engine, count, asked, turns):
    assert ENGINES[engine].unroll(count, asked) == turns
