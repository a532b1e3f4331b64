"""Fine-tuning: what is trained moves, what is frozen stays, adapters start as none."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze, unfreeze

import dp_ilg
from dp_ilg.experiments.models.gpt2 import Gpt2, Gpt2Size, gpt2_loss, random_params
from dp_ilg.training.fine_tune import TUNINGS, make_tuning_step, tune
from dp_ilg.training.lora import adapters, merge, with_adapters

MODULE = Gpt2(Gpt2Size(vocabulary=13, context=8, width=8, depth=1, heads=2))
LOSS = gpt2_loss(MODULE)
TEXTS = jax.random.randint(jax.random.key(0), (4, 6), 0, 13, "int32")
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def params():
    return random_params(MODULE, 5)


def named(name, params):
    return tune(name, LOSS, params, TEXTS[0], key=KEY, rank=2, head="ln_f")


def moved(own):
    """Adapters that do something."""
    return jax.tree.map(lambda x: x + 0.1, own)


def test_adapters_change_nothing_until_they_are_trained(params):
    tuning = named("lora", params)
    before = float(jax.jit(lambda p: LOSS(p, TEXTS[0]))(params))
    run = jax.jit(lambda own: tuning.loss_fn(params, own, TEXTS[0]))
    np.testing.assert_allclose(float(run(tuning.trained)), before, rtol=1e-6)
    assert abs(float(run(moved(tuning.trained))) - before) > 1e-4


def test_merged_adapters_are_the_same_network(params):
    tuning = named("lora", params)
    own, before = moved(tuning.trained), jax.tree.leaves(params)
    merged = merge(params, own)
    expected = float(tuning.loss_fn(params, own, TEXTS[0]))
    np.testing.assert_allclose(float(LOSS(merged, TEXTS[0])), expected, rtol=1e-5)
    for one, other in zip(before, jax.tree.leaves(params), strict=True):
        assert one is other  # the base is as it was


def test_layers_with_several_axes_have_adapters_too():
    module = nn.MultiHeadDotProductAttention(2)
    x = jnp.ones((3, 4))
    params = module.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        out: Any = module.apply({"params": params}, x)
        return jnp.sum(out**2)

    own = moved(adapters(loss, params, x, key=KEY, rank=2))
    assert {k: v["a"].shape for k, v in own.items()} == {
        "query": (4, 2),
        "key": (4, 2),
        "value": (4, 2),
        "out": (2, 2, 2),
    }
    value = with_adapters(loss, 0.5)(params, own, x)
    np.testing.assert_allclose(value, loss(merge(params, own, 0.5), x), rtol=1e-4)


def test_adapters_and_biases_have_the_paths_they_should(params):
    tuning = named("lora", params)
    grad_fn = dp_ilg.clipped_grad(
        lambda p, text: tuning.loss_fn(params, p, text), l2_clip_norm=1.0
    )
    rows = grad_fn.explain(tuning.trained, TEXTS)
    assert len(rows) == 8 and all("dot_general" in row.why for row in rows)
    assert {row.path for row in rows} <= {"gram", "formed"}


@pytest.mark.parametrize("name", ["lora", pytest.param("bias", marks=pytest.mark.slow)])
def test_engines_agree_on_what_is_tuned(name, params):
    tuning = named(name, params)
    own = moved(tuning.trained)
    geometry = dp_ilg.Geometry.uniform(own)
    found = []
    for engine in ("bookkeeping", "vmap"):
        grad_fn = dp_ilg.clipped_grad(
            lambda p, text: tuning.loss_fn(tuning.frozen, p, text),
            l2_clip_norm=0.05,
            engine=engine,
        )
        found.append(jax.jit(grad_fn)(own, TEXTS, geometry=geometry).gradients)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0])) > 1e-4


def test_rows_divide_the_parameters(params):
    every = {"/".join(p) for p, _ in dp_ilg.layers.paths(params)}
    sizes = {}
    for name in TUNINGS:
        tuning = named(name, params)
        sizes[name] = sum(x.size for x in jax.tree.leaves(tuning.trained))
        if not name.startswith("lora"):
            assert set(tuning.trained) | set(tuning.frozen) == every
            assert not set(tuning.trained) & set(tuning.frozen)
    assert sizes["head"] < sizes["bias"] < sizes["all"] == 13 * 8 + 8 * 8 + 872 + 16
    with pytest.raises(ValueError, match="no way of tuning 'loar'"):
        tune("loar", LOSS, params, TEXTS[0], key=KEY)
    with pytest.raises(ValueError, match="No parameter is picked"):
        tune("head", LOSS, params, TEXTS[0], key=KEY)


def test_a_step_trains_the_adapters_and_holds_the_base_once(params):
    tuning = named("lora", params)
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=40, batch_size=4, num_steps=2
    )
    tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(2))
    step = make_tuning_step(tuning.loss_fn, tx, l2_clip_norm=plan.l2_clip_norm)
    own = jax.tree.map(jnp.copy, tuning.trained)
    lowered = step.lower(params, own, tx.init(own), TEXTS, None)
    longest = max(map(len, lowered.as_text().splitlines()))
    assert longest < 20_000  # a table of 13 x 8 as a constant would be longer
    trained, _ = lowered.compile()(params, own, tx.init(own), TEXTS, None)
    change = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (trained, tuning.trained)), strict=True)
    ]
    assert min(change) > 1e-3


def test_an_adapter_that_is_not_reached_is_refused(params):
    tuning = named("lora", params)
    jitted = jax.jit(LOSS)
    jitted(params, TEXTS[0])  # its trace is kept, and calls no layer again
    with pytest.raises(ValueError, match="is not reached; pass the loss without"):
        with_adapters(jitted)(params, tuning.trained, TEXTS[0])
    with pytest.raises(ValueError, match="No dense layer matches 'h9"):
        adapters(LOSS, params, TEXTS[0], key=KEY, where="h9*")


# --- what does not fit is refused ----------------------------------------------------


def dense(name="top"):
    """A network of one dense layer, its parameters, and its loss."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name=name)(x)

    net = Net()
    params = net.init(jax.random.key(0), jnp.ones(2))["params"]
    return net, params


def made(loss, params, **options):
    return adapters(loss, params, jnp.ones(2), key=KEY, rank=1, **options)


def test_merging_keeps_frozen_dictionaries():
    net, params = dense()
    own = moved(made(lambda p, x: net.apply({"params": p}, x)[0], params))
    plain, frozen = merge(params, own), merge(freeze(params), own)
    assert isinstance(frozen, FrozenDict) and isinstance(plain, dict)
    jax.tree.map(np.testing.assert_array_equal, unfreeze(frozen), plain)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: {"params": p}, "no kernel at 'top' in the .* under 'params'"),
        (lambda p: {"other": p["top"]}, "no kernel at 'top' .* applied to them"),
        (lambda p: {"top": p["top"]["kernel"]}, "no kernel at 'top'"),
        (lambda p: {"top": {"kernel": jnp.ones((2, 3))}}, r"shape \(2, 1\), but .*3\)"),
    ],
)
def test_adapters_are_not_merged_into_another_network(change, words):
    net, params = dense()
    own = made(lambda p, x: net.apply({"params": p}, x)[0], params)
    with pytest.raises(ValueError, match=words):
        merge(change(params), own)


def test_two_networks_do_not_share_an_adapter():
    net, params = dense()
    both = {"one": params, "other": jax.tree.map(jnp.ones_like, params)}

    def apply(p, x):
        return net.apply({"params": p}, x)[0]

    def apart(p, x):
        return apply(p["one"], x) + apply(p["other"], x)

    with pytest.raises(ValueError, match="called 'top'.*make layers parts"):
        made(apart, both)
    with pytest.raises(ValueError, match="no kernel at 'top'"):
        made(lambda p, x: apply(p["one"], x), both)
    own = made(lambda p, x: apply(p, x) * apply(p, -x), params)  # one network, twice
    with pytest.raises(ValueError, match="Several layers"):
        with_adapters(apart)(both, own, jnp.ones(2))


def test_a_batch_is_refused_where_the_loss_shows_it():
    net, params = dense()
    loss = lambda p, x: jnp.asarray(net.apply({"params": p}, x))[..., 0]  # noqa: E731
    assert list(made(loss, params)) == ["top"]
    with pytest.raises(
        ValueError, match=r"shape \(3,\), but must be a scalar; pass ONE"
    ):
        adapters(loss, params, jnp.ones((3, 2)), key=KEY)


@pytest.mark.parametrize("name", TUNINGS)
def test_a_head_that_is_not_there_is_refused(name):
    net, params = dense()
    loss = lambda p, x: net.apply({"params": p}, x)[0]  # noqa: E731
    with pytest.raises(ValueError, match="head is 'tpo', but .*did you mean top"):
        tune(name, loss, params, jnp.ones(2), key=KEY, head="tpo")
    found = tune("bias", loss, params, jnp.ones(2), key=KEY)  # none is asked for
    assert list(found.trained) == ["top/bias"]


def test_a_layer_with_batch_dims_is_refused_by_name():
    class Side(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(3, axis=-1, batch_dims=(0,), name="side")(x)

    example = jnp.ones((2, 4))
    variables: Any = Side().init(KEY, example[None])
    own = variables["params"]

    def loss(p, x):
        out: Any = Side().apply({"params": p}, x[None])
        return jnp.sum(out)

    with pytest.raises(ValueError, match="'side' has batch_dims"):
        tune("lora", loss, own, example, key=KEY)


def test_adapters_beside_a_new_head():
    """A head for other classes: trained whole, and no adapter stands beside it."""

    class Net(nn.Module):
        classes: int

        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4, name="body")(x))
            return nn.Dense(self.classes, name="top")(x)

    x = jnp.ones(3)
    base = Net(7).init(jax.random.key(0), x)["params"]
    fresh = Net(2).init(jax.random.key(1), x)["params"]
    params, net = {**base, "top": fresh["top"]}, Net(2)

    def loss(params, x):
        return net.apply({"params": params}, x)[0] ** 2

    tuning = tune("lora_head", loss, params, x, key=KEY, rank=2, head="top")
    assert list(tuning.trained["adapters"]) == ["body"]
    assert sorted(tuning.trained["head"]) == ["top/bias", "top/kernel"]
    assert sorted(tuning.frozen) == ["body/bias", "body/kernel"]
    own = moved(tuning.trained)
    whole = tuning.merged(tuning.frozen, own)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    value = tuning.loss_fn(tuning.frozen, own, x)
    np.testing.assert_allclose(value, loss(whole, x), rtol=1e-4)
    assert value != loss(params, x)


def test_a_network_that_is_all_head_has_no_place_for_adapters():
    net = nn.Sequential([nn.Dense(2)])
    x = jnp.ones(3)
    params = net.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        out: Any = net.apply({"params": params}, x)
        return out.sum()

    with pytest.raises(ValueError, match='use "head"'):
        tune("lora_head", loss, params, x, key=KEY, head="layers_0")


@pytest.mark.parametrize("name", [row for row in TUNINGS if row != "lora_head"])
def test_every_row_is_merged_into_the_whole_network(name, params):
    tuning = named(name, params)
    whole = tuning.merged(tuning.frozen, tuning.trained)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
