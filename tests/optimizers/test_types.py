"""A law over all methods: updates have the parameters' dtypes, states those of init."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.optimizers.averaging import average_iterates
from tests.helpers.baseline_cases import NAMES, bowl, examples, make, plan_for, zeros
from tests.helpers.models import plan

WIDTHS = {"bfloat16": False, "float16": False, "bfloat16-x64": True}
WIDTHS["float32-x64"] = True
ADAMS = ["plain", "noise_corrected", "balanced"]
SOURCES = ["scores", "released", "public"]
NUMPY = dict(b1=np.float64(0.9), ema_decay=np.float64(0.9), floor=np.float64(0.1))


def ilg(source, **options):
    the_plan = plan(score_budget=0.01 if source == "scores" else 0.0)
    rate = options.pop("rate", 1e-2)
    return dp_ilg.dp_adam_ilg(
        rate, the_plan, key=jax.random.key(0), source=source, **options
    )


METHODS = {
    **{name: lambda name=name: make(name) for name in NAMES},
    **{
        f"{source}, {adam}": lambda s=source, a=adam: ilg(s, adam=a, weight_decay=0.1)
        for source in SOURCES
        for adam in ADAMS
    },
    "momentum": lambda: make("dp_sgd", momentum=0.9),
    "centred": lambda: make("adaclip", momentum=np.float64(0.9)),
    "schedule": lambda: ilg("scores", rate=optax.cosine_decay_schedule(1e-2, 9)),
    "NumPy's numbers": lambda: ilg("scores", rate=np.float64(0.1), **NUMPY),
    "average": lambda: average_iterates(ilg("scores")),
    "aggregate": lambda: dp_ilg.differentially_private_aggregate(
        1.0, np.float64(1.0), jax.random.key(0), batch_size=4
    ),
}


def kinds(tree):
    """Path, shape, dtype and weakness of every leaf: what ``lax.scan`` compares."""
    found = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: tree))
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype, x.weak_type) for path, x in found
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", METHODS)
def test_updates_have_the_parameters_types_and_states_those_of_init(name, width):
    dtype = width.partition("-")[0]
    with jax.enable_x64(WIDTHS[width]):
        tx = METHODS[name]()
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), zeros())
        grads = jax.tree.map(lambda p: jnp.ones((4, *p.shape), p.dtype), params)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        found = [(x.shape, x.dtype) for x in jax.tree.leaves(updates)]
        assert found == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
        given = jax.tree_util.tree_leaves_with_path(after)
        now = [
            (jax.tree_util.keystr(path), x.shape, x.dtype, x.weak_type)
            for path, x in given
        ]
        assert now == kinds(state)


@pytest.mark.parametrize("name", ["dp_adam_ilg", "released, balanced", "average"])
def test_equinox_keeps_bfloat16_parameters_in_one_trace_and_in_scan(name):
    """``equinox.apply_updates`` adds and does not cast."""
    tx, traces = METHODS[name](), []
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), zeros())

    def step(carry, _):
        params, state = carry
        traces.append(1)
        batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), examples(0))
        grads = jax.vmap(jax.grad(bowl), (None, 0))(params, batch)
        updates, state = tx.update(grads, state, params)
        return (equinox.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    compiled = jax.jit(step)
    carry = start
    for _ in range(3):
        carry, _ = compiled(carry, None)
    assert kinds(carry) == kinds(start) and len(traces) == 1
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 3))(start)
    for a, b in zip(*map(jax.tree.leaves, (scanned[0], carry[0])), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05
        )
        assert not np.array_equal(np.asarray(a, np.float32), np.ones(a.shape))


def test_a_foreign_link_that_changes_its_types_is_put_right():
    """With x64 on, a transformation of somebody else's may compute in float64."""
    wide: Any = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.float32),
        lambda updates, state, params=None: (updates, state + np.float64(1.0)),  # pyright: ignore
    )
    with jax.enable_x64(True):
        tx = dp_ilg.chain(
            dp_ilg.clip_per_example(1.0),
            dp_ilg.set_layer_importance("uniform", None),
            dp_ilg.add_importance_noise(plan_for("dp_sgd"), key=jax.random.key(0)),
            wide,
        )
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), zeros())
        state = tx.init(params)
        _, after = tx.update(examples(0), state, params)
        assert wide.update(params, state[3])[1].dtype == jnp.float64
        assert after[3].dtype == jnp.float32 and float(after[3]) == 1.0
