"""All methods and engines run under JAX's strict settings, whoever switched them on.

What shapes and types decide is only traced, which takes milliseconds; NaNs and keys are
watched while steps run.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.lots import clipped_lot, sum_lot
from tests.helpers.baseline_cases import NAMES, make, zeros
from tests.helpers.models import (
    CLIP_MODES,
    LAYERINGS,
    mlp_batch,
    mlp_loss,
    mlp_params,
    plan,
)
from tests.zoo.cases import ZOO

ENGINES = ["auto", "vmap"]


@contextlib.contextmanager
def strict(x64=False):
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.enable_x64(x64),
    ):
        yield


SETTINGS = {"strict": strict, "strict-x64": lambda: strict(True)}
EACH = {
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
}


def strict_loss(params, example):
    """A loss that is itself strict: a row in, nothing broadcast, one dtype."""
    x, y = example
    hidden = jnp.tanh(x @ params["d1"]["kernel"] + params["d1"]["bias"])
    logits = hidden @ params["d2"]["kernel"] + params["d2"]["bias"]
    return jnp.sum(jnp.square(logits)) * y


def strict_batch():
    x, y = mlp_batch(6)
    return x, y.astype(jnp.float32)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_a_step(name, setting):
    with SETTINGS[setting]():
        tx, params = make(name), jax.tree.map(jnp.float32, zeros())
        state = tx.init(params)
        grads = jax.tree.map(lambda p: jnp.ones((4, *p.shape), p.dtype), params)
        updates, _ = jax.eval_shape(tx.update, grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("layers", ["blocks_axis1", "frozen"])
def test_every_source_and_adam_takes_a_step(layers):
    rows = [("scores", "plain"), ("released", "balanced"), ("scores", "balanced")]
    with strict(x64=True):
        params, batch = mlp_params(), strict_batch()
        for source, adam in [*rows, ("public", "noise_corrected")]:
            tx = dp_ilg.dp_adam_ilg(
                1e-2,
                plan(score_budget=0.1 if source == "scores" else 0.0),
                key=jax.random.key(0),
                source=source,
                adam=adam,
                layers=LAYERINGS[layers],
                weight_decay=0.1,
            )
            grad_fn = dp_ilg.clipped_grad(strict_loss, l2_clip_norm=1.0)
            step = lambda p, s, tx=tx, f=grad_fn: tx.update(  # noqa: E731
                f(p, batch, geometry=tx.geometry(s)), s, p
            )
            jax.eval_shape(step, params, tx.init(params))


@pytest.mark.parametrize("setting", ["strict"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_every_clip_and_lot_is_summed(mode, engine, setting):
    with SETTINGS[setting]():
        params, batch = mlp_params(), strict_batch()
        geometry = dp_ilg.Geometry.uniform(params, "leaf")
        padding = jnp.arange(6) == 2
        for size in (None, 4):
            grad_fn = dp_ilg.clipped_grad(
                strict_loss,
                l2_clip_norm=1.0,
                engine=engine,
                clip_mode=mode,
                microbatch_size=size,
            )
            assert grad_fn.microbatch(params, batch) and grad_fn.explain(params, batch)

            def sums(params, batch, f=grad_fn):
                more: Any = dict(geometry=geometry, is_padding_example=padding)
                lot = clipped_lot(f, params, batch, 3, **more)
                return sum_lot([lot, f(params, batch, **more)])

            jax.eval_shape(sums, params, batch)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_call_without_jit_gives_the_same_sum(setting):
    grad_fn = dp_ilg.clipped_grad(strict_loss, l2_clip_norm=0.5, microbatch_size=4)
    params, batch = mlp_params(), strict_batch()
    geometry = dp_ilg.Geometry.uniform(params, "leaf")
    wanted = grad_fn(params, batch, geometry=geometry).gradients
    with SETTINGS[setting]():
        got = grad_fn(params, batch, geometry=geometry).gradients
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, wanted)


def refused(function, *inputs):
    """Whether JAX's settings refuse a function."""
    try:
        jax.eval_shape(lambda *args: function(*args), *inputs)
    except (ValueError, TypeError, jax.errors.JAXTypeError) as error:
        assert "broadcast" in str(error) or "romotion" in str(error)
        return True
    return False


SHARE = sorted(ZOO)[::16]


@pytest.mark.parametrize("setting", EACH)
@pytest.mark.parametrize("name", SHARE)
def test_the_engine_takes_what_a_users_own_gradient_takes(name, setting):
    """The settings hold in the loss, and in nothing else."""
    case = ZOO[name]()
    geometry = dp_ilg.Geometry.uniform(case.params)
    grad_fn = dp_ilg.clipped_grad(case.loss, l2_clip_norm=1.0)
    call = lambda p, b: grad_fn(p, b, geometry=geometry)  # noqa: E731
    loss = jax.vmap(case.loss, (None, 0))
    plain = jax.vmap(jax.grad(case.loss), (None, 0))
    with EACH[setting]():
        inputs = case.params, case.batch
        if refused(loss, *inputs):
            assert refused(call, *inputs)
        elif not refused(plain, *inputs):
            assert not refused(call, *inputs)


def test_a_loss_that_is_not_strict_is_refused_as_by_jax():
    params, batch = {"w": jnp.ones((3, 2))}, jnp.ones((4, 2))
    loss = lambda p, x: jnp.sum(p["w"] + x)  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fn(params, batch, geometry=geometry)
    with (
        jax.numpy_rank_promotion("raise"),
        pytest.raises(ValueError, match="could not be broadcast"),
    ):
        grad_fn(params, batch, geometry=geometry)


@contextlib.contextmanager
def watched():
    """Every result is looked through for NaN, and every key for a second use."""
    with jax.debug_nans(True), jax.debug_key_reuse(True):
        yield


WATCHED = ["dp_adam_ilg", "adaclip", "quantile_clipping_per_layer"]


@pytest.mark.parametrize("name", WATCHED)
def test_no_nan_and_no_key_is_met_twice_in_three_steps(name):
    with watched():
        tx, params = make(name), mlp_params()
        state = tx.init(params)
        mode = "per_layer" if "per_layer" in name else "joint"
        grad_fn = dp_ilg.clipped_grad(
            mlp_loss, l2_clip_norm=1.0, clip_mode=mode, microbatch_size=4
        )

        @jax.jit
        def step(params, state, batch, padding):
            more: Any = dict(geometry=tx.geometry(state), is_padding_example=padding)
            updates, state = tx.update(grad_fn(params, batch, **more), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        for seed in range(3):
            batch, padding = mlp_batch(6, seed), jnp.arange(6) >= 6 - 3 * seed
            params, state = step(params, state, batch, padding)
        with pytest.raises(FloatingPointError):
            jax.jit(lambda x: 0 * x / x)(jnp.zeros(2))
