"""Outside of ``jax.jit`` a clipped gradient compiles once, and stays what it was."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping import eager
from tests.helpers.models import trees_close

GEOMETRY = dp_ilg.Geometry.uniform({"a": jnp.zeros((4, 3)), "b": jnp.zeros(3)})
COMPILED = []


def _note(event: str, duration_secs: float, **facts: Any) -> None:
    if "backend_compile" in event:
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


@pytest.fixture(autouse=True)
def no_programs():
    eager.forget()


def programs(function):
    """How many programs XLA compiled, or took from disk, meanwhile."""
    before = len(COMPILED)
    function()
    return len(COMPILED) - before


def loss(params, example):
    return jnp.sum(jnp.tanh(example @ params["a"] + params["b"]) ** 2)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    return {"a": a, "b": jnp.full(3, 0.1)}


def rows(seed, size=12):
    return np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)


def clipped(function, seed, engine="auto", size: Any = 5, **more):
    """One call outside of jit, the function made anew."""
    grad_fn = dp_ilg.clipped_grad(
        function, l2_clip_norm=0.5, engine=engine, microbatch_size=size
    )
    return grad_fn(parameters(seed), rows(seed), geometry=GEOMETRY, **more)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_later_calls_compile_nothing_and_give_what_jit_gives(engine):
    grad_fn = dp_ilg.clipped_grad(
        loss, l2_clip_norm=0.5, engine=engine, microbatch_size=5
    )
    call = lambda p, x: grad_fn(p, x, geometry=GEOMETRY)  # noqa: E731
    inputs = [(parameters(k), rows(k)) for k in range(4)]
    assert programs(lambda: call(*inputs[0])) > 0
    later = []
    assert programs(lambda: later.extend(call(*x) for x in inputs[1:])) == 0
    for found, given in zip(later, inputs[1:], strict=True):
        trees_close(found.gradients, jax.jit(call)(*given).gradients)
    assert programs(lambda: call(parameters(), rows(0, 13))) > 0  # another shape


def test_a_function_or_loss_that_is_made_anew_compiles_nothing():
    clipped(loss, 0)
    assert programs(lambda: clipped(loss, 1)) == 0
    again = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"] + p["b"]) ** 2)  # noqa: E731
    assert programs(lambda: clipped(again, 2)) == 0
    other = lambda p, x: jnp.sum(jnp.sin(x @ p["a"] + p["b"]) ** 2)  # noqa: E731
    assert programs(lambda: clipped(other, 2)) > 0
    trees_close(clipped(again, 2).gradients, clipped(loss, 2).gradients)


def test_what_a_loss_closes_over_may_change():
    """Neither a number nor an array that has changed since is taken from before."""
    held = {"scale": 1.0, "shift": jnp.zeros(3)}

    def shifted(params, example):
        inside = example @ params["a"] * held["scale"] + params["b"] + held["shift"]
        return jnp.sum(jnp.tanh(inside) ** 2)

    trees_close(clipped(shifted, 3).gradients, clipped(loss, 3).gradients)
    for name, value in {"shift": jnp.ones(3), "scale": 2.0}.items():
        before = clipped(shifted, 3)
        held[name] = value
        after, whole = clipped(shifted, 3), clipped(shifted, 3, size=None)
        trees_close(after.gradients, whole.gradients)
        assert not np.allclose(after.gradients["a"], before.gradients["a"])


def test_losses_that_differ_in_a_derivative_of_their_own_are_told_apart():
    def with_slope(slope):
        @jax.custom_vjp
        def own(x):
            return jnp.sum(x)

        own.defvjp(lambda x: (own(x), x), lambda x, g: (slope * g * jnp.ones_like(x),))
        return lambda p, x: own(x @ p["a"] + p["b"]) * 0.01

    one, three = with_slope(1.0), with_slope(3.0)
    a, b = clipped(one, 4).gradients["a"], clipped(three, 4).gradients["a"]
    np.testing.assert_allclose(3 * a, b, rtol=1e-4)
    assert programs(lambda: clipped(one, 5)) == 0


def test_a_loop_in_the_loss_compiles_once_in_a_single_batch_too():
    def looped(params, example):
        step = lambda h, _: (jnp.tanh(h + example @ params["a"]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, params["b"], None, length=3)[0])

    clipped(looped, 0, size=None)
    assert programs(lambda: clipped(looped, 1, size=None)) == 0


def test_no_parameters_batches_or_losses_are_kept_and_few_programs():
    def called():
        params, held = parameters(), jnp.ones(3)
        one = lambda p, x: loss(p, x) + jnp.sum(held * p["b"])  # noqa: E731
        grad_fn = dp_ilg.clipped_grad(one, l2_clip_norm=1.0, microbatch_size=5)
        found = grad_fn(params, rows(0), geometry=GEOMETRY)
        assert found.gradients["a"].shape == (4, 3)
        return weakref.ref(one), weakref.ref(params["a"]), weakref.ref(held)

    seen = called()
    gc.collect()
    assert [x() for x in seen] == [None] * 3
    for k in range(eager.MOST_PROGRAMS + 3):
        closed = eager.traced(lambda w, x, k=k: w * x + k, jnp.ones(()), jnp.ones(2))
        eager.compiled(closed, None, "none", lambda f, *x: f(*x))
    assert len(eager._PROGRAMS) == eager.MOST_PROGRAMS


def test_within_jit_nothing_is_cached():
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=0.5, microbatch_size=5)
    jax.jit(lambda p, x: grad_fn(p, x, geometry=GEOMETRY))(parameters(), rows(0))
    assert not eager._PROGRAMS
