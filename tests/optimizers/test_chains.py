"""Limits as oracles, composition with Optax and Flax, and one compiled step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from optax import contrib

import dp_ilg
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.geometry.rules import RULES as RULE_TABLE
from tests.helpers.models import (
    CLIP_MODES,
    RULES,
    mlp_batch,
    mlp_loss,
    mlp_params,
    noiseless,
    per_example,
    plan,
    trees_close,
)


def train(tx, steps=5, start=None, gradient=per_example):
    params: Any = mlp_params() if start is None else start
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        grads = gradient(params, mlp_batch(seed=step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def mean_gradient(params, batch):
    return jax.tree.map(lambda g: g.mean(0), per_example(params, batch))


def spelt_out(the_plan, *tail, clip_mode="joint", rule="min_noise_energy", seed=0):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return dp_ilg.chain(
        dp_ilg.clip_per_example(the_plan.l2_clip_norm, clip_mode=clip_mode),
        dp_ilg.score_layer_importance(rule, the_plan, key=k1),
        dp_ilg.add_importance_noise(the_plan, key=k2),
        *tail,
    )


# --- limits -------------------------------------------------------------------


def test_the_rules_are_the_tested_ones():
    assert sorted(RULE_TABLE) == sorted(RULES)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adam", ["plain", "noise_corrected"])
def test_no_noise_and_no_clip_is_adam(rule, adam):
    tx = dp_ilg.dp_adam_ilg(
        1e-2, noiseless(), key=jax.random.key(0), importance=rule, adam=adam, eps=1e-3
    )
    private, _ = train(tx)
    plain, _ = train(optax.adam(1e-2, eps=1e-3), gradient=mean_gradient)
    atol = 1e-6 if adam == "plain" else 2e-3
    trees_close(private, plain, rtol=1e-6, atol=atol)


def test_noise_corrected_adam_without_floor_is_adam_when_there_is_no_noise():
    tx = spelt_out(
        noiseless(),
        dp_ilg.scale_by_noise_corrected_adam(noiseless(), eps=1e-3, floor=1e-30),
        optax.scale_by_learning_rate(1e-2),
    )
    private, _ = train(tx)
    plain, _ = train(optax.adam(1e-2, eps=1e-3), gradient=mean_gradient)
    trees_close(private, plain, rtol=1e-6, atol=1e-6)


def test_uniform_is_dp_adam():
    """Against the scorer-free chain with the ordinary norm, noise included."""
    the_plan = plan()
    key = jax.random.key(5)
    noise_key = jax.random.split(key)[1]
    tx = dp_ilg.dp_adam_ilg(1e-2, the_plan, key=key, importance="uniform")
    dp_adam = dp_ilg.chain(
        dp_ilg.clip_per_example(1.0),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(the_plan, key=noise_key),
        optax.adam(1e-2),
    )
    trees_close(train(tx)[0], train(dp_adam)[0], rtol=1e-5, atol=1e-6)


def test_zero_score_budget_is_no_scorer():
    the_plan = plan(score_budget=0.0)
    tx = dp_ilg.dp_adam_ilg(1e-2, the_plan, key=jax.random.key(1), importance="paper")
    uniform = dp_ilg.dp_adam_ilg(
        1e-2, the_plan, key=jax.random.key(1), importance="uniform", source="public"
    )
    trees_close(train(tx)[0], train(uniform)[0], rtol=1e-6, atol=1e-7)


def test_dp_adam_ilg_is_the_chain_spelt_out():
    the_plan = plan()
    tx = dp_ilg.dp_adam_ilg(1e-3, the_plan, key=jax.random.key(0))
    spelt = spelt_out(
        the_plan, optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3)
    )
    trees_close(train(tx)[0], train(spelt)[0], rtol=1e-6, atol=1e-7)


def test_plain_optax_chain_works_with_a_given_geometry():
    the_plan = plan(score_budget=0.0)
    tx: Any = optax.chain(
        dp_ilg.clip_per_example(1.0),
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0)),
        optax.adam(1e-2),
    )
    params = mlp_params()
    grads = per_example(params, mlp_batch())
    with pytest.raises(ValueError, match="got no geometry"):
        tx.update(grads, tx.init(params), params)
    geometry = dp_ilg.Geometry.uniform(params)
    updates, _ = tx.update(grads, tx.init(params), params, geometry=geometry)
    assert updates["d1"]["kernel"].shape == (5, 7)


# --- every row of every table -------------------------------------------------


@pytest.mark.parametrize("source", ["scores", "released", "public"])
@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("adam", ["plain", "noise_corrected", "balanced"])
def test_every_combination_trains_with_stable_state(source, mode, adam):
    the_plan = plan(score_budget=0.01 if source == "scores" else 0.0)
    tx = dp_ilg.dp_adam_ilg(
        1e-2, the_plan, key=jax.random.key(0), source=source, clip_mode=mode, adam=adam
    )
    params = mlp_params()
    state = tx.init(params)
    grads = per_example(params, mlp_batch())
    updates, new = jax.jit(tx.update)(grads, state, params)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    kinds = lambda s: [  # noqa: E731
        (x.shape, x.dtype, getattr(x, "weak_type", None)) for x in jax.tree.leaves(s)
    ]  # noqa: E731
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert kinds(new) == kinds(state)


@pytest.mark.parametrize("rule", [*RULES, lambda i, n: i * 2 + n])
def test_average_profile_keeps_its_norm(rule):
    """After scoring, an example of the average profile has the geometry norm 1."""
    the_plan = plan(noise_multiplier=1e-6)
    tx = spelt_out(the_plan, rule=rule)
    params = mlp_params()
    grads = per_example(params, mlp_batch())
    _, state = tx.update(grads, tx.init(params), params)
    geometry, shares = tx.geometry(state), tx.importance(state)
    np.testing.assert_allclose(jnp.sum(shares), 1.0, rtol=1e-5)
    np.testing.assert_allclose(geometry.norm(jnp.sqrt(shares)), 1.0, rtol=1e-5)


def test_weights_follow_the_rule_exactly():
    """Noise-free scores: w_j proportional to I_j^p n_j^-q with the batch's profile."""
    the_plan = plan(noise_multiplier=1e-7)
    params = mlp_params()
    grads = per_example(params, mlp_batch())
    groups = dp_ilg.layers.group(params)
    norms = np.asarray(from_gradients(grads, groups).norms)
    profile = (norms / np.linalg.norm(norms, axis=1, keepdims=True)).mean(0)
    sizes = np.array(groups.sizes, float)
    powers = {"paper": (1, 0), "min_noise_energy": (0.5, 0.25), "equal_snr": (1, 0.5)}
    powers["sqrt_share"] = (0.5, 0)
    for rule, (p, q) in powers.items():
        tx = spelt_out(the_plan, rule=rule)
        _, state = tx.update(grads, tx.init(params), params)
        weights = np.asarray(tx.geometry(state).weights)
        want = profile**p * sizes**-q
        np.testing.assert_allclose(weights / weights[0], want / want[0], rtol=1e-4)


def test_min_noise_energy_minimises_the_noise_energy():
    """No other rule of the table gives less sum n_j w_j^2 at the same profile."""
    from dp_ilg.geometry.geometry import scaled_to_profile

    rng = np.random.default_rng(0)
    sizes = jnp.array([160_000.0, 272.0, 17.0])
    energy = lambda w: float(jnp.sum(sizes * w**2))  # noqa: E731
    for _ in range(20):
        shares = jnp.asarray(rng.dirichlet(np.ones(3)).clip(1e-3), jnp.float32)
        shares = shares / shares.sum()
        best = energy(
            scaled_to_profile(
                RULE_TABLE["min_noise_energy"](jnp.sqrt(shares), sizes), shares
            )
        )
        for rule in RULES:
            other = scaled_to_profile(RULE_TABLE[rule](jnp.sqrt(shares), sizes), shares)
            assert best <= energy(other) * 1.0001


def test_scores_recover_the_profile_through_noise():
    """Averaged over steps the charged score finds shares an uncharged view would."""
    the_plan = plan(
        num_examples=1000, batch_size=400, num_steps=40, noise_multiplier=2.0
    )
    tx = spelt_out(the_plan)
    params = mlp_params()
    state = tx.init(params)
    grads = per_example(params, mlp_batch(400))
    norms = from_gradients(grads, dp_ilg.layers.group(params)).norms
    profile = (norms / jnp.linalg.norm(norms, axis=1, keepdims=True)).mean(0)
    want = profile**2 / jnp.sum(profile**2)
    update = jax.jit(tx.update)
    for _ in range(40):
        _, state = update(grads, state, params)
    np.testing.assert_allclose(tx.importance(state), want, atol=0.05)


def test_released_gradients_find_the_louder_layer_for_free():
    the_plan = plan(score_budget=0.0, noise_multiplier=0.5, num_steps=20)
    tx = dp_ilg.dp_adam_ilg(
        1e-9, the_plan, key=jax.random.key(0), source="released", importance="paper"
    )
    params = {"a": jnp.zeros(20), "b": jnp.zeros(20)}
    loud = {"a": jnp.full((12, 20), 0.2), "b": jnp.full((12, 20), 0.005)}
    state = tx.init(params)
    for _ in range(10):
        _, state = tx.update(loud, state, params)
    shares = tx.importance(state)
    assert shares[0] > 5 * shares[1]


# --- layers -------------------------------------------------------------------


def test_frozen_parameters_cost_neither_norm_nor_noise():
    layers = dp_ilg.layers.by_module(frozen=["d1"])
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0), layers=layers)
    params, _ = train(tx)
    jax.tree.map(np.testing.assert_array_equal, params["d1"], mlp_params()["d1"])
    assert not np.array_equal(params["d2"]["kernel"], mlp_params()["d2"]["kernel"])
    groups = dp_ilg.layers.group(mlp_params(), layers)
    assert groups.names == ("d2",) and groups.sizes == (24,)
    huge = jax.tree.map(lambda g: g, per_example(mlp_params(), mlp_batch()))
    huge["d1"] = jax.tree.map(lambda g: g * 1e6, huge["d1"])
    state = tx.init(mlp_params())
    a, _ = tx.update(huge, state, mlp_params())
    b, _ = tx.update(per_example(mlp_params(), mlp_batch()), state, mlp_params())
    trees_close(a, b)


def test_frozen_parameters_do_not_decay():
    layers = dp_ilg.layers.by_module(frozen=["d1"])
    tx = dp_ilg.dp_adam_ilg(
        1e-2, plan(), key=jax.random.key(0), layers=layers, weight_decay=0.5
    )
    params, _ = train(tx)
    jax.tree.map(np.testing.assert_array_equal, params["d1"], mlp_params()["d1"])


def test_blocks_are_named_sized_and_log_spaced():
    params = {"embed": {"embedding": jnp.zeros((10_000, 16))}, "out": jnp.zeros(3)}
    groups = dp_ilg.layers.group(
        params, dp_ilg.layers.blocks("embedding", num_blocks=8)
    )
    assert groups.names[0] == "embed/embedding[0:3]" and len(groups.names) == 9
    assert sum(groups.sizes) == 160_003
    edges = groups.leaves[0].edges
    assert edges == (0, 3, 10, 32, 100, 316, 1000, 3162, 10_000)
    cut = dp_ilg.layers.group(
        params, dp_ilg.layers.by_leaf(dp_ilg.layers.blocks("embed", axis=1, edges=[4]))
    )
    assert cut.names[:2] == ("embed/embedding[:, 0:4]", "embed/embedding[:, 4:16]")


# --- Optax --------------------------------------------------------------------


def test_learning_rate_schedules_weight_decay_masks_and_injection_work():
    the_plan = plan()
    rate = optax.linear_schedule(1e-2, 0.0, 5)
    scheduled, _ = train(
        dp_ilg.dp_adam_ilg(rate, the_plan, key=jax.random.key(0), weight_decay=0.1)
    )
    tail = (
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(0.1), {"d1": True, "d2": True}),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=rate),
    )
    injected, _ = train(spelt_out(the_plan, *tail))
    trees_close(scheduled, injected, rtol=1e-5, atol=1e-6)


def test_the_whole_optimizer_can_be_injected():
    the_plan = plan()
    make = optax.inject_hyperparams(
        dp_ilg.dp_adam_ilg, static_args=("plan", "key", "importance", "layers")
    )
    tx: Any = make(learning_rate=1e-2, plan=the_plan, key=jax.random.key(0))
    plain = dp_ilg.dp_adam_ilg(1e-2, the_plan, key=jax.random.key(0))
    trees_close(train(tx)[0], train(plain)[0], rtol=1e-5, atol=1e-6)
    state = tx.init(mlp_params())
    state.hyperparams["learning_rate"] = jnp.asarray(1e-20)
    params = mlp_params()
    updates, _ = tx.update(per_example(params, mlp_batch()), state, params)
    assert all(float(jnp.max(jnp.abs(u))) < 1e-18 for u in jax.tree.leaves(updates))


def test_masking_the_private_chain_is_refused():
    """optax.masked would let masked-out leaves' raw gradients through."""
    tx: Any = optax.masked(
        dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0)),
        {"d1": False, "d2": True},
    )
    with pytest.raises(ValueError, match="masked out by optax.masked"):
        tx.init(mlp_params())


def late(step, **extra):
    return step > 3


AROUND = {
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        "averages before clipping, use clipped_grad(..., microbatch_size=) or add",
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 3),
        "optax.apply_if_finite around a private chain would choose by raw gradients",
    ),
    "conditionally_transform": (
        lambda tx: optax.conditionally_transform(tx, late),
        "optax.conditionally_transform around a private chain",
    ),
    "conditionally_mask": (
        lambda tx: optax.conditionally_mask(tx, late),
        "optax.conditionally_mask around a private chain",
    ),
}
PRIVATE = {
    "chain": lambda: dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0)),
    "nested": lambda: optax.chain(PRIVATE["chain"](), optax.identity()),
    "aggregate": lambda: dp_ilg.differentially_private_aggregate(
        1.0, 1.0, jax.random.key(0), batch_size=12
    ),
}


@pytest.mark.parametrize("gradient", [per_example, mean_gradient])
@pytest.mark.parametrize("private", PRIVATE)
@pytest.mark.parametrize("wrapper", AROUND)
def test_wrappers_that_see_raw_gradients_are_refused(wrapper, private, gradient):
    """They would average examples before the clip, or let raw gradients decide."""
    wrap, words = AROUND[wrapper]
    tx: Any = wrap(PRIVATE[private]())
    params = mlp_params()
    grads, state = gradient(params, mlp_batch()), tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError) as caught:
            update(grads, state, params)
        text = str(caught.value)
        assert words in text
        assert "\n" not in text and text.endswith(".") and len(text) < 320, text


def test_a_clipped_gradient_cannot_pass_a_check_for_nan_either():
    """Whether it is finite tells that some example was not (law: zero is absent)."""
    tx: Any = optax.apply_if_finite(PRIVATE["chain"](), 3)
    params = mlp_params()
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    clipped = grad_fn(params, mlp_batch(), geometry=geometry)
    with pytest.raises(ValueError, match="around a private chain"):
        tx.update(clipped, tx.init(params), params)


def test_behind_the_noise_the_same_wrappers_work():
    """There they see releases: a check for NaN is post-processing."""
    tail = (
        optax.apply_if_finite(optax.scale_by_adam(), 3),
        optax.MultiSteps(optax.identity(), 2).gradient_transformation(),
    )
    tx = spelt_out(plan(num_steps=2), *tail)
    params, state = mlp_params(), tx.init(mlp_params())
    for step in range(3):
        grads = per_example(params, mlp_batch(seed=step))
        updates, state = tx.update(grads, state, params)
        moved = any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
        assert moved == (step == 1)
    assert int(state[3].total_notfinite) == 1  # the step past the plan is NaN


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_an_injected_key_is_refused(make_key):
    """It would stand in state.hyperparams, which people log (law: keys are given)."""
    key, params = make_key(0), mlp_params()
    aggregate = dp_ilg.differentially_private_aggregate
    partial = functools.partial(dp_ilg.dp_adam_ilg, plan=plan(), key=key)
    inject: Any = optax.inject_hyperparams
    for tx in (
        inject(dp_ilg.dp_adam_ilg)(1e-2, plan(), key=key),
        inject(partial)(1e-2),
        inject(aggregate, static_args="batch_size")(1.0, 1.0, key, batch_size=12),
    ):
        with pytest.raises(ValueError) as caught:
            tx.init(params)
        text = str(caught.value)
        assert "in state.hyperparams; give it static_args='key'" in text
        assert "\n" not in text and text.endswith(".")
    for tx in (
        inject(dp_ilg.dp_adam_ilg, static_args="key")(1e-2, plan(), key=key),
        inject(lambda rate: dp_ilg.dp_adam_ilg(rate, plan(), key=key))(1e-2),
    ):
        assert "key" not in tx.init(params).hyperparams


@pytest.mark.parametrize(
    "tail",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-3),
        optax.rmsprop(1e-3),
        optax.lamb(1e-3),
        optax.chain(optax.clip(1.0), optax.lion(1e-3)),
    ],
    ids=["sgd", "adamw", "rmsprop", "lamb", "lion"],
)
def test_any_optax_transformation_may_follow(tail):
    params, _ = train(spelt_out(plan(), tail))
    assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(params))


# --- optax.contrib ------------------------------------------------------------


def test_contrib_without_noise_gives_the_same_release():
    params, batch = mlp_params(), mlp_batch()
    grads = per_example(params, batch)
    theirs: Any = contrib.differentially_private_aggregate(0.5, 0.0, jax.random.key(0))
    ours = dp_ilg.differentially_private_aggregate(
        0.5, 0.0, jax.random.key(0), batch_size=12
    )
    a, _ = theirs.update(grads, theirs.init(params))
    b, _ = ours.update(grads, ours.init(params))
    trees_close(a, b)


def test_contrib_with_noise_gives_the_same_distribution():
    """Two-sample KS and variance of 40,000 draws; a 10 % wider one is rejected."""
    params = {"w": jnp.zeros(40_000)}
    grads = {"w": jnp.zeros((4, 40_000))}
    theirs: Any = contrib.differentially_private_aggregate(0.5, 1.3, jax.random.key(0))
    ours = dp_ilg.differentially_private_aggregate(
        0.5, 1.3, jax.random.key(1), batch_size=4
    )
    a = np.asarray(theirs.update(grads, theirs.init(params))[0]["w"])
    b = np.asarray(ours.update(grads, ours.init(params))[0]["w"])
    ks: Any = scipy.stats.ks_2samp
    assert ks(a, b).pvalue > 1e-4
    assert ks(a, b * 1.1).pvalue < 1e-4
    assert 0.97 < np.var(a) / np.var(b) < 1.03


def test_contrib_faults_are_gone():
    tx = dp_ilg.differentially_private_aggregate(
        1.0, 0.0, jax.random.key(0), batch_size=2
    )
    params = {"w": jnp.zeros(2)}
    empty, _ = tx.update({"w": jnp.zeros((0, 2))}, tx.init(params))
    assert empty["w"].tolist() == [0.0, 0.0]
    bad, _ = tx.update({"w": jnp.array([[jnp.nan, 1e6]])}, tx.init(params))
    assert bad["w"].tolist() == [0.0, 0.0]
    with pytest.raises(TypeError):
        dp_ilg.differentially_private_aggregate(1.0, 1.0, None, batch_size=2)


# --- one compiled step --------------------------------------------------------


def compiled_step(tx, grad_fn, counter):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        counter.append(1)
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("adam", ["plain", "noise_corrected", "balanced"])
def test_one_trace_donated_buffers_no_callback(dtype, adam):
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0), adam=adam)
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0, microbatch_size=4)
    traces = []
    step = compiled_step(tx, grad_fn, traces)
    for _ in range(2):  # a second run: donation must not have eaten the factory's key
        params = mlp_params(dtype=dtype)
        state = tx.init(params)
        for seed in range(3):
            old = params["d1"]["kernel"], state[2].step
            params, state = step(params, state, mlp_batch(seed=seed))
            assert old[0].is_deleted() and old[1].is_deleted()
    assert len(traces) == 1
    assert params["d1"]["kernel"].dtype == dtype
    text = str(jax.make_jaxpr(step)(params, state, mlp_batch()))
    assert "callback" not in text and "infeed" not in text


def test_clipped_grad_goes_through_flax_train_state():
    flax_state = pytest.importorskip("flax.training.train_state")
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    state = flax_state.TrainState.create(apply_fn=None, params=mlp_params(), tx=tx)

    @jax.jit
    def step(state, batch):
        geometry = tx.geometry(state.opt_state)
        return state.apply_gradients(
            grads=grad_fn(state.params, batch, geometry=geometry)
        )

    for seed in range(5):
        state = step(state, mlp_batch(seed=seed))
    trees_close(state.params, train(tx)[0], rtol=1e-4, atol=1e-5)


def test_devices_and_chunks_draw_one_noise():
    """The sum over chunks gets one noise draw: its variance does not grow."""
    the_plan = plan(score_budget=0.0)
    params = {"w": jnp.zeros(40_000)}
    tx = dp_ilg.chain(
        dp_ilg.clip_per_example(1.0),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0)),
    )
    state = tx.init(params)
    loss = lambda p, x: jnp.sum(p["w"]) * 0 * x  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    geometry = tx.geometry(state)
    parts = [grad_fn(params, jnp.ones(3), geometry=geometry) for _ in range(8)]
    release, _ = tx.update(functools.reduce(lambda a, b: a + b, parts), state, params)
    scale = the_plan.noise_multipliers[0] / the_plan.batch_size
    assert 0.97 < float(jnp.std(release["w"])) / scale < 1.03
