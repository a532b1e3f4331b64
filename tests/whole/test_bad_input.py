"""Bad input to the library: one clear sentence with the value and the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params, per_example, plan

NAN, INF = float("nan"), float("inf")


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 320, text
    return text


@pytest.mark.parametrize("bad", [-1.0, 0.0, NAN, INF, None, "1", True])
@pytest.mark.parametrize(
    "name, call",
    {
        "l2_clip_norm": lambda v: dp_ilg.clip_per_example(v),
        "l2_clip_norm ": lambda v: dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=v),
        "learning_rate": lambda v: dp_ilg.dp_adam_ilg(v, plan(), key=jax.random.key(0)),
    }.items(),
)
def test_numbers_must_be_positive(name, call, bad):
    if name == "learning_rate" and bad == 0:
        call(bad)  # 0 is a rate: warm-ups start there
        return
    with pytest.raises(ValueError) as caught:
        call(bad)
    text = sentence(caught)
    assert name.strip() in text and repr(bad) in text


@pytest.mark.parametrize("bad", [0, -3])
def test_microbatch_size(bad):
    with pytest.raises(ValueError) as caught:
        dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0, microbatch_size=bad)
    assert "microbatch_size" in str(caught.value)


@pytest.mark.parametrize(
    "bad", [0, None, "key", np.array([0, 1], np.uint32), jnp.zeros(3)]
)
def test_wrong_key_type(bad):
    for call in (
        lambda: dp_ilg.dp_adam_ilg(1e-2, plan(), key=bad),
        lambda: dp_ilg.add_importance_noise(plan(), key=bad),
        lambda: dp_ilg.score_layer_importance("paper", plan(), key=bad),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert "jax.random.key(seed)" in sentence(caught)


def test_several_keys_at_once_are_refused():
    with pytest.raises(TypeError, match="one PRNG key"):
        dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.split(jax.random.key(0)))


def test_same_key_for_score_and_noise():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="same key") as caught:
        dp_ilg.chain(
            dp_ilg.clip_per_example(1.0),
            dp_ilg.score_layer_importance("paper", plan(), key=key),
            dp_ilg.add_importance_noise(plan(), key=key),
        )
    sentence(caught)


@pytest.mark.parametrize(
    "links, words",
    [
        ("cs", "0 add_importance_noise"),
        ("sn", "0 clip_per_example"),
        ("cn", "0 sources of layer importance"),
        ("cssn", "2 sources of layer importance"),
        ("nsc", "must stand before"),
        ("", "0 clip_per_example"),
    ],
)
def test_chains_of_wrong_shape(links, words):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    make = {
        "c": lambda: dp_ilg.clip_per_example(1.0),
        "s": lambda: dp_ilg.score_layer_importance("paper", plan(), key=next(keys)),
        "n": lambda: dp_ilg.add_importance_noise(plan(), key=next(keys)),
    }
    with pytest.raises(ValueError, match=words) as caught:
        dp_ilg.chain(*[make[x]() for x in links])
    sentence(caught)


def test_per_example_gradients_without_or_with_unequal_batch_axes():
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    params = mlp_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match="no batch axis") as caught:
        tx.update(params, state, params)
    sentence(caught)
    grads = per_example(params, mlp_batch())
    grads["d1"]["bias"] = grads["d1"]["bias"][:5]
    with pytest.raises(ValueError, match="unequal length") as caught:
        tx.update(grads, state, params)
    sentence(caught)
    with pytest.raises(ValueError, match="do not fit") as caught:
        tx.update({"w": jnp.ones((3, 2))}, state, params)
    sentence(caught)


@pytest.mark.parametrize(
    "params, kind, words",
    [
        ({}, ValueError, "empty"),
        ({"w": jnp.arange(3)}, TypeError, "int32"),
        ({"w": jnp.ones(3, jnp.complex64)}, TypeError, "complex64"),
        ({"w": 1.0}, TypeError, "float"),
        (
            {"params": {"w": jnp.ones(2)}, "batch_stats": {"m": jnp.ones(2)}},
            ValueError,
            "BatchNorm",
        ),
    ],
    ids=["empty", "integer", "complex", "python", "batch_stats"],
)
def test_parameter_trees(params, kind, words):
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    with pytest.raises(kind, match=words) as caught:
        tx.init(params)
    sentence(caught)


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda p, e: jnp.ones(2) * jnp.sum(p["d1"]["bias"]) * e[0][0], "one scalar"),
        (lambda p, e: (mlp_loss(p, e), 3.0), "one scalar"),
        (lambda p, e: jnp.sum(p["d1"]["bias"]), "ignores the example"),
        (
            lambda p, e: mlp_loss(p, e) - jax.lax.pmean(e[0][0], "batch"),
            "statistics over other examples",
        ),
        (lambda p, e: e[1], "int"),
    ],
    ids=["vector", "aux", "ignores", "mixes", "integer"],
)
def test_losses(loss, words):
    params = mlp_params()
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)
    with pytest.raises(ValueError, match=words) as caught:
        grad_fn(params, mlp_batch(), geometry=geometry)
    sentence(caught)


def test_batches_and_masks():
    params = mlp_params()
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)
    x, y = mlp_batch()
    for batch, words in (
        ((x, y[:4]), "unequal length"),
        ((x, 3), "scalar"),
        ((), "empty tree"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            grad_fn(params, batch, geometry=geometry)
        sentence(caught)
    for mask in (jnp.zeros(3, bool), jnp.zeros(12), jnp.zeros((12, 1), bool)):
        with pytest.raises(ValueError, match="is_padding_example") as caught:
            grad_fn(params, (x, y), geometry=geometry, is_padding_example=mask)
        sentence(caught)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dp_ilg.layers.blocks("e"), "exactly one"),
        (lambda: dp_ilg.layers.blocks("e", edges=[3, 2]), "ascend"),
        (lambda: dp_ilg.layers.blocks("e", num_blocks=0), "num_blocks is 0"),
        (lambda: group(dp_ilg.layers.blocks("zz", num_blocks=2)), "'zz'"),
        (lambda: group(dp_ilg.layers.blocks("kernel", axis=7, num_blocks=2)), "axis 7"),
        (lambda: group(dp_ilg.layers.blocks("kernel", edges=[999])), "edge 999"),
        (
            lambda: group(dp_ilg.layers.by_leaf(frozen=["*"])),
            "Every parameter is frozen",
        ),
        (lambda: group(3), "layers is 3"),
        (lambda: dp_ilg.Geometry.of(mlp_params(), [1.0]), "2 groups"),
        (lambda: dp_ilg.Geometry.of(mlp_params(), [1.0, -1.0]), "must be positive"),
        (lambda: dp_ilg.Geometry.of(mlp_params(), {"x": 1.0}), "name the groups"),
    ],
)
def test_layers_and_geometries(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in sentence(caught)


def group(layers):
    return dp_ilg.layers.group(mlp_params(), layers)


@pytest.mark.parametrize(
    "rule",
    [lambda i, n: i[:1], lambda i, n: -i, lambda i, n: i * NAN, lambda i, n: 0 * i],
)
def test_importance_rules_must_give_positive_weights(rule):
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0), importance=rule)
    with pytest.raises(ValueError, match="importance rule") as caught:
        tx.init(mlp_params())
    sentence(caught)


def test_plan_of_the_wrong_type():
    wrong: Any = {"sigma": 1.0}
    with pytest.raises(Exception, match="PrivacyPlan"):
        dp_ilg.add_importance_noise(wrong, key=jax.random.key(0))


def test_state_of_another_chain():
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    other = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0), weight_decay=0.1)
    params = mlp_params()
    with pytest.raises(ValueError, match="the same chain"):
        tx.update(per_example(params, mlp_batch()), other.init(params), params)


def test_score_and_noise_of_different_plans_are_refused():
    """Neither plan would account for both; found by an outside reader."""
    k1, k2 = jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match="different plans") as caught:
        dp_ilg.chain(
            dp_ilg.clip_per_example(1.0),
            dp_ilg.score_layer_importance("paper", plan(), key=k1),
            dp_ilg.add_importance_noise(plan(score_budget=0.0), key=k2),
        )
    sentence(caught)


@pytest.mark.parametrize("bound, weights", [(100.0, [1.0, 1.0]), (1.0, [9.0, 1.0])])
def test_chunks_clipped_differently_are_refused_or_poisoned(bound, weights):
    params, batch = mlp_params(), mlp_batch()

    def clipped(norm, values):
        geometry = dp_ilg.Geometry(jnp.array(values), group("module"))
        grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=norm)
        return jax.jit(grad_fn)(params, batch, geometry=geometry)

    one = clipped(1.0, [1.0, 1.0])
    with pytest.raises(ValueError, match="different weights, coord") as caught:
        _ = one + clipped(bound, weights)
    sentence(caught)
    total = jax.jit(lambda: clipped(1.0, [1.0, 1.0]) + clipped(bound, weights))()
    assert np.isnan(total.l2_clip_norm)
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    updates, _ = tx.update(total, tx.init(params), params)
    assert all(bool(jnp.all(jnp.isnan(u))) for u in jax.tree.leaves(updates))
    assert (one + one).sensitivity() == 1.0


@pytest.mark.parametrize(
    "options",
    [{"b1": 1.5}, {"b2": -0.1}, {"eps": 0.0}, {"weight_decay": NAN}, {"floor": 2.0}],
)
def test_adam_settings(options):
    with pytest.raises(ValueError) as caught:
        dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0), **options)
    assert next(iter(options)) in sentence(caught)
