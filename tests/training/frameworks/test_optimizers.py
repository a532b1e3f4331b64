"""Every optimizer behind the noise is that optimizer, fed with the release."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.base import PrivateTransformation
from dp_ilg.training.frameworks.optimizers import optimizer_of
from dp_ilg.training.step import make_train_step

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.ones(3)}
X = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)
STEPS = len(X)
EVERY = optax.contrib
SLOW = pytest.mark.slow


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) * params["b"])


def labelled(params):
    return {"w": "weights", "b": "bias"}


ROWS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "nadamw": lambda: optax.nadamw(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "adan": lambda: optax.adan(0.1),
    "lion": lambda: optax.lion(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "novograd": lambda: optax.novograd(0.1),
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "yogi": lambda: optax.yogi(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(9)),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lbfgs without line search": lambda: optax.lbfgs(0.1, linesearch=None),
    "muon": lambda: EVERY.muon(0.1),
    "schedule_free": lambda: EVERY.schedule_free_adamw(0.1),
    "prodigy": lambda: EVERY.prodigy(0.1),
    "dog": lambda: EVERY.dog(0.1),
    "dadapt_adamw": lambda: EVERY.dadapt_adamw(0.1),
    "ademamix": lambda: EVERY.ademamix(0.1),
    "adopt": lambda: EVERY.adopt(0.1),
    "acprop": lambda: EVERY.acprop(0.1),
    "madgrad": lambda: EVERY.madgrad(0.1),
    "cocob": lambda: EVERY.cocob(),
    "mechanize": lambda: EVERY.mechanize(optax.sgd(0.1)),
    "sam": lambda: EVERY.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2),
    "partition": lambda: optax.partition(
        {"weights": optax.adam(0.1), "bias": optax.sgd(0.01)}, labelled
    ),
    "masked": lambda: optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 3)
    ),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "agc": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "nonnegative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "lookahead": lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5),
}


@pytest.fixture(scope="module")
def plan():
    return dp_ilg.plan_privacy(
        epsilon=2.0, delta=1e-5, num_examples=1000, batch_size=100, num_steps=10
    )


def chained(plan, *behind):
    score_key, noise_key = jax.random.split(jax.random.key(1))
    return dp_ilg.chain(
        dp_ilg.clip_per_example(plan.l2_clip_norm),
        dp_ilg.score_layer_importance("min_noise_energy", plan, key=score_key),
        dp_ilg.add_importance_noise(plan, key=noise_key),
        *behind,
    )


@pytest.fixture(scope="module")
def private(plan):
    """The three verbs and the clipped gradient, each compiled once for all rows."""
    tx = chained(plan, optax.identity())
    update = jax.jit(tx.update)
    facts = dict(geometry=tx.geometry, importance=tx.importance, links=tx.links)
    verbs = PrivateTransformation(
        tx.init, lambda g, s, p=None, **_: update(g, s, p), role="private", **facts
    )
    return verbs, jax.jit(dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm))


def trained(private, tx, params, point=lambda params: params) -> Any:
    """A few steps by any transformation of the release."""
    verbs, grad_fn = private
    state, inner = verbs.init(PARAMS), tx.init(params)
    for batch in X:
        at = point(params)
        clipped = grad_fn(at, batch, geometry=verbs.geometry(state))
        release, state = verbs.update(clipped, state, at)
        updates, inner = tx.update(release, inner, params)
        params = optax.apply_updates(params, updates)
    return params


def in_a_chain(private, tx) -> tuple[Any, Any]:
    """The same steps with the transformation behind the noise of a chain."""
    verbs, grad_fn = private
    tx = dp_ilg.chain(verbs, tx)
    params, state = PARAMS, tx.init(PARAMS)
    for batch in X:
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        updates, state = tx.update(clipped, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


RARE = (
    *("adabelief", "adamax", "adagrad", "adadelta", "lars", "novograd", "radam"),
    *("yogi", "sm3", "rprop", "optimistic", "dog", "dadapt_adamw", "adopt", "acprop"),
    *("amsgrad", "madgrad", "cocob", "mechanize", "agc", "nonnegative", "rmsprop"),
)
NAMES = [pytest.param(n, marks=SLOW) if n in RARE else n for n in ROWS]


@pytest.mark.parametrize("name", NAMES)
def test_any_optimizer_stands_behind_the_noise(name, private):
    params, state = in_a_chain(private, optimizer_of(PARAMS, ROWS[name]()))
    if name == "lookahead":
        both = optax.LookaheadParams.init_synced(PARAMS)
        expected = trained(private, ROWS[name](), both, lambda both: both.fast)
        assert_close(optax.tree.get(state, "slow"), expected.slow)
        expected = expected.fast
    else:
        expected = trained(private, ROWS[name](), PARAMS)
    assert_close(params, expected)
    assert any(np.any(params[leaf] != PARAMS[leaf]) for leaf in PARAMS)


@pytest.mark.parametrize("name", NAMES)
def test_no_array_is_held_twice(name, private):
    """Or a compiled step could not overwrite parameters and state."""
    state = dp_ilg.chain(private[0], optimizer_of(PARAMS, ROWS[name]())).init(PARAMS)
    leaves = [x for x in jax.tree.leaves((PARAMS, state)) if isinstance(x, jax.Array)]
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    places = [x.unsafe_buffer_pointer() for x in leaves if not is_key(x)]
    assert len(set(places)) == len(places) > 2


COMPILED = ("adamw", "muon", "schedule_free", "prodigy", "MultiSteps", "sam")


@pytest.mark.parametrize(
    "name", [COMPILED[0], *(pytest.param(n, marks=SLOW) for n in COMPILED[1:])]
)
def test_a_compiled_step_does_the_same(name, plan, private):
    tx = chained(plan, optimizer_of(PARAMS, ROWS[name]()))
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
    step, params = make_train_step(grad_fn, tx), jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    for batch in X:
        params, state = step(params, state, [(batch, None)])
    assert_close(params, trained(private, ROWS[name](), PARAMS))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


CANNOT = {
    "reduce_on_plateau": (EVERY.reduce_on_plateau(), "`value`.*schedule"),
    "in a chain": (
        optax.chain(optax.adam(0.1), EVERY.reduce_on_plateau()),
        "`value`.*schedule",
    ),
    "polyak_sgd": (optax.polyak_sgd(), "`value`.*schedule"),
    "momo": (EVERY.momo(), "`value`.*schedule"),
    "lbfgs": (optax.lbfgs(), r"`value_fn`.*linesearch=None"),
    "sophia": (EVERY.sophia(0.1), "`obj_fn`.*Adam"),
    "opaque sam": (
        EVERY.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        "`grad_fn`.*opaque_mode=False",
    ),
    "dpsgd": (
        EVERY.differentially_private_aggregate(1.0, 1.0, key=jax.random.key(0)),
        "clips or adds up examples",
    ),
    "lookahead inside": (
        optax.chain(optax.lookahead(optax.sgd(0.1), 2, 0.5), optax.ema(0.9)),
        "outermost",
    ),
    "a mask of another model": (
        optax.masked(optax.sgd(0.1), {"v": True}),
        "these parameters alone",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_asks_for_private_facts_is_refused(name):
    optimizer, sentence = CANNOT[name]
    with pytest.raises(ValueError, match=sentence):
        optimizer_of(PARAMS, optimizer)


def test_the_models_own_optimizer_is_found(plan):
    from flax import nnx
    from flax.training.train_state import TrainState

    mine = optax.adamw(0.1)
    made = TrainState.create(apply_fn=None, params=PARAMS, tx=mine)
    assert optimizer_of(made) is mine and optimizer_of(made, optax.sgd(1.0)) is not mine
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, mine, wrt=nnx.Param)
    assert optimizer_of((module, optimizer)) is mine
    assert optimizer_of(module, optimizer) is mine and optimizer_of(None, mine) is mine
    with pytest.raises(ValueError, match="No optimizer was given, and Linear"):
        optimizer_of(module)
    with pytest.raises(ValueError, match="No optimizer was given"):
        optimizer_of(PARAMS)
    with pytest.raises(TypeError, match="float, but must be a transformation"):
        optimizer_of(PARAMS, 0.1)
    with pytest.raises(ValueError, match="private already"):
        optimizer_of(PARAMS, dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="private already"):
        optimizer_of(PARAMS, dp_ilg.add_importance_noise(plan, key=jax.random.key(0)))
