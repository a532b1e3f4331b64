"""Probes: each depth by hand, law by law, resumed, and refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.geometry.rules import RULES
from dp_ilg.optimizers.public.generators import GENERATORS, Public, made_up
from dp_ilg.optimizers.public.link import silent_groups
from dp_ilg.optimizers.public.probe import probe_key
from dp_ilg.optimizers.public.readings import READINGS
from dp_ilg.optimizers.public.statistics import DEPTHS
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params, per_example, plan

PARAMS = mlp_params()
EXAMPLE = (jnp.zeros(5), jnp.int32(0))
FREE = plan(score_budget=0.0, num_steps=8)
SCORED = plan(score_budget=0.1, num_steps=8)
FACTS: dict[str, Any] = dict(
    loss_fn=mlp_loss, example=EXAMPLE, batch="gaussian", num_classes=3, every=2,
    num_examples=12,
)  # fmt: skip


def probe(**changes):
    return dp_ilg.Probe(**FACTS | changes)


def optimizer(source, the_plan=FREE, **options):
    given: dict[str, Any] = dict(key=jax.random.key(0), layers="leaf", source=source)
    given |= options
    return dp_ilg.dp_adam_ilg(0.05, the_plan, **given)


def synthetic(the_probe, params, step=0):
    """Gradients of the probe's examples, one a row, leaf by leaf."""
    batch = the_probe.generator()(probe_key(the_probe.seed, step))
    return [np.asarray(x, float) for x in jax.tree.leaves(per_example(params, batch))]


def lengths(leaves):
    return np.stack([np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in leaves], 1)


def profiled(raw, shares):
    return raw * np.sqrt(np.sum(shares / shares.sum() / raw**2))


def by_hand(the_probe, leaves, p):
    """``L`` of every axis, in NumPy: of what each depth promises."""
    found = []
    for x in leaves:
        own = []
        for axis in range(x.ndim - 1):
            g = np.moveaxis(x, axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)
            second = np.einsum("iak,ibk->ab", g, g) / len(x)
            if the_probe.depth == "diagonal" or x.ndim == 2:
                values, turn = np.diag(second), np.eye(len(second))
            else:
                values, turn = np.linalg.eigh(second)
            values = np.maximum(values / values.mean(), 0)
            scale = profiled((values + the_probe.damping) ** (p / 2), values)
            own.append(turn @ np.diag(scale) @ turn.T)
        found.append(own)
    return found


def inside(leaves, factors):
    found = []
    for x, own in zip(leaves, factors, strict=True):
        for axis, factor in enumerate(own):
            x = np.moveaxis(
                np.tensordot(x, np.linalg.inv(factor), (axis + 1, 1)), -1, axis + 1
            )
        found.append(x)
    return found


# --- the depths -------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["paper", "min_noise_energy"])
def test_one_weight_a_group_by_hand(rule):
    tx = optimizer(probe(), importance=rule)
    geometry = tx.geometry(tx.init(PARAMS))
    norms = lengths(synthetic(probe(), PARAMS)).mean(0)
    shares = np.maximum(norms**2 / np.sum(norms**2), 0.01**2)
    shares /= shares.sum()
    made: Any = RULES[rule]
    raw = made(np.sqrt(shares), np.array(geometry.groups.sizes, float))
    assert geometry.coordinates is None
    assert np.allclose(geometry.weights, profiled(raw, shares), rtol=1e-4)
    assert np.allclose(tx.importance(tx.init(PARAMS)), shares, rtol=1e-4)


@pytest.mark.parametrize(("rule", "p"), [("paper", 1), ("min_noise_energy", 0.5)])
@pytest.mark.parametrize("depth", ["diagonal", "kronecker"])
def test_maps_by_hand(depth, rule, p):
    own = probe(depth=depth, microbatch_size=4)
    tx = optimizer(own, importance=rule)
    geometry = tx.geometry(tx.init(PARAMS))
    leaves = synthetic(own, PARAMS)
    wanted = by_hand(own, leaves, p)
    maps = geometry.coordinates
    pairs = zip(wanted, maps.back, maps.into, strict=True)
    for factors, back, into in pairs:
        for factor, b, i in zip(factors, back, into, strict=True):
            full, inverse = (
                np.diag(x) if x.ndim == 1 else np.asarray(x) for x in (b, i)
            )
            assert np.allclose(full, factor, rtol=2e-3, atol=2e-3)
            assert np.allclose(full @ inverse, np.eye(len(full)), atol=2e-4)
    norms = lengths(inside(leaves, wanted))
    importance = norms.mean(0) / np.linalg.norm(norms.mean(0))
    energies = np.array(
        [np.prod([np.sum(np.square(f)) for f in factors]) for factors in wanted]
    )
    made: Any = RULES[rule]
    raw = made(importance, energies)
    weights = profiled(raw, importance**2)
    before = np.mean(np.sum(np.square(lengths(leaves)), 1))
    after = np.mean(np.sum(np.square(norms), 1))
    assert np.allclose(geometry.weights, weights * np.sqrt(after / before), rtol=5e-3)


def test_along_one_axis_an_average_probe_example_keeps_its_norm():
    own = probe(depth="diagonal", example=(jnp.zeros(5), jnp.zeros(())), damping=0.3,
                loss_fn=lambda w, e: jnp.square(w @ e[0] - e[1]))  # fmt: skip
    tx = optimizer(own, importance="paper")
    maps = tx.geometry(tx.init(jnp.ones(5))).coordinates
    batch = own.generator()(probe_key(0, 0))
    rows = jax.vmap(jax.grad(own.loss_fn), (None, 0))(jnp.ones(5), batch)
    squares = [
        float(jnp.mean(jnp.sum(x**2, 1))) for x in (rows, maps.entered([rows])[0])
    ]
    assert squares[0] == pytest.approx(squares[1], rel=1e-4)


def test_convolutions_have_maps_of_their_channels_and_long_axes_scales():
    groups = dp_ilg.layers.group(
        {"conv": jnp.zeros((3, 3, 4, 5)), "wide": jnp.zeros((9, 4))},
        dp_ilg.layers.by_leaf(dp_ilg.layers.blocks("wide", axis=1, edges=[2])),
    )
    kinds = probe(depth="kronecker", max_axis=8).kinds(groups)
    assert kinds == (
        ("none", "none", "matrix", "matrix"),
        ("vector", "vector"),
    )
    assert probe(depth="diagonal").kinds(groups)[0] == ("none", "none", *["vector"] * 2)


@pytest.mark.parametrize("depth", DEPTHS)
def test_microbatches_change_rounding_only(depth):
    found = [
        jax.tree.leaves(
            optimizer(probe(depth=depth, microbatch_size=size)).init(PARAMS)
        )
        for size in (1, 5, 12)
    ]
    for one, two, three in zip(*found, strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            assert np.allclose(one, three, atol=2e-4) and np.allclose(
                two, three, atol=2e-4
            )


# --- the laws ---------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_private_batch_changes_the_next_geometry(depth):
    """Law: past releases only. The step that refreshes sees two batches."""
    tx = optimizer(probe(depth=depth, every=1))
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    found = [
        tx.geometry(update(per_example(PARAMS, mlp_batch(seed=s)), state, PARAMS)[1])
        for s in (1, 2)
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.array_equal(one, other)
    moved = jax.tree.map(lambda x: x + 0.5, PARAMS)
    rows = per_example(PARAMS, mlp_batch(seed=1))
    third = tx.geometry(update(rows, state, moved)[1])
    assert not np.allclose(found[0].weights, third.weights)


@pytest.mark.parametrize("depth", DEPTHS)
def test_it_is_refreshed_every_so_many_steps_at_released_parameters(depth):
    own = probe(depth=depth, every=2, seed=2**40 + 3)
    tx = optimizer(own)
    update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
    rows = per_example(PARAMS, mlp_batch())
    weights = [tx.geometry(state).weights]
    for step in range(1, 5):
        began = params
        updates, state = update(rows, state, params)
        params = optax.apply_updates(params, updates)
        weights.append(tx.geometry(state).weights)
        if step % 2:
            assert np.array_equal(weights[-1], weights[-2])
        elif depth == "group":
            norms = lengths(synthetic(own, began, step)).mean(0)
            shares = norms**2 / np.sum(norms**2)
            assert np.allclose(tx.importance(state), shares, atol=2e-4)
    assert len({w.tobytes() for w in map(np.asarray, weights)}) == 3


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def plain(x):
    return jax.random.key_data(x) if is_key(x) else x


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_resumed_run_has_the_same_bits(depth, tmp_path):
    import orbax.checkpoint as ocp

    tx = optimizer(probe(depth=depth, every=3))
    step = jax.jit(tx.update, donate_argnums=1)
    rows = per_example(PARAMS, mlp_batch())

    def steps(params, state, count):
        for _ in range(count):
            updates, state = step(rows, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = steps(PARAMS, tx.init(PARAMS), 7)
    half = steps(PARAMS, tx.init(PARAMS), 4)
    keys = jax.tree.map(plain, half)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "half", keys)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "half", keys)
    back = jax.tree.map(
        lambda x, y: jax.random.wrap_key_data(x) if is_key(y) else x, found, half
    )
    resumed = steps(back[0], back[1], 3)
    for one, other in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        assert np.array_equal(plain(one), plain(other))


@pytest.mark.parametrize("steps", READINGS)
@pytest.mark.parametrize("groups", ["probe", "scores"])
def test_beside_scores_and_in_every_reading_a_run_goes_well(steps, groups):
    own = probe(depth="kronecker", groups=groups, steps=steps)
    tx = optimizer(own, SCORED if groups == "scores" else FREE)
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)

    @jax.jit
    def step(params, state):
        clipped = grad_fn(params, mlp_batch(), geometry=tx.geometry(state))
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    geometry = tx.geometry(state)
    assert geometry.coordinates.whitened == (steps == "whitened")
    assert not np.allclose(geometry.weights, geometry.weights[0], rtol=1e-3)


def test_noise_has_the_shape_of_the_maps():
    """Whitened draws are standard normal at sigma, and not at 0.97 or 1.03 of it."""
    own = probe(depth="kronecker", num_examples=64, rule="paper")
    big = mlp_params(sizes=(40, 60, 3))
    own = dataclasses.replace(own, example=(jnp.zeros(40), jnp.int32(0)))
    tx = optimizer(own)
    state = tx.init(big)
    geometry = tx.geometry(state)
    clip, noise = tx.links[0], next(x for x in tx.links if x.role == "noise")
    empty = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), big)
    clipped, _ = clip.update(empty, clip.init(big), geometry=geometry)
    update = jax.jit(noise.update)
    draws = []
    for seed in range(16):
        fresh = noise.init(big)._replace(key=jax.random.key(seed))
        release, _ = update(clipped, fresh)
        leaves = geometry.coordinates.entered(jax.tree.leaves(release))
        known = geometry.groups.expand(geometry.weights)
        draws += [np.ravel(x / w) for x, w in zip(leaves, known, strict=True)]
    sigma = float(FREE.gradient_noise_multipliers[0] * FREE.l2_clip_norm)
    found = np.concatenate(draws) * FREE.batch_size / sigma
    assert found.size > 40_000
    spread = 4 * np.sqrt(2 / found.size)
    assert abs(np.mean(found**2) - 1) < spread
    for wrong in (0.97, 1.03):
        assert abs(np.mean((found * wrong) ** 2) - 1) > spread


# --- generators -------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_every_row_fills_examples_by_key(name):
    whole = name == "zipf_tokens"
    shape = (30,) if name.startswith("zipf") else (8, 8, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if whole else jnp.float32)
    example = (x, jnp.zeros((), jnp.int32))
    make = made_up(GENERATORS[name], example, 6, Public(classes=4, tokens=50))
    one, two = make(jax.random.key(0)), make(jax.random.key(1))
    assert one[0].shape == (6, *shape) and one[0].dtype == x.dtype
    assert not np.array_equal(one[0], two[0])
    assert bool(jnp.isfinite(one[0]).all()) and set(np.unique(one[1])) <= {0, 1, 2, 3}
    assert np.array_equal(one[0], make(jax.random.key(0))[0])


def test_pink_images_fall_off_as_one_over_frequency():
    fill = GENERATORS["pink_images"].fill
    images = fill(jax.random.key(0), (400, 32, 32, 1), jnp.float32, Public())
    power = np.mean(np.abs(np.fft.fft2(images[..., 0] - 0.5)) ** 2, 0)
    frequency = np.fft.fftfreq(32)[1:12]
    slope = np.polyfit(np.log(frequency), np.log(power[0, 1:12]), 1)[0]
    assert -2.2 < slope < -1.6  # of power; cutting to [0, 1] flattens a little
    assert abs(float(images.mean()) - 0.5) < 0.01


def test_zipf_tokens_follow_the_law():
    fill = GENERATORS["zipf_tokens"].fill
    drawn = fill(jax.random.key(0), (200, 500), jnp.int32, Public(tokens=20))
    found = np.bincount(np.ravel(drawn), minlength=20) / drawn.size
    assert np.abs(found - dp_ilg.priors.zipf(20)).max() < 0.005


# --- refusals ---------------------------------------------------------------------

OTHER = (jnp.zeros(4), jnp.int32(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(depth="row"), "depth is 'row', but must be one of"),
        (dict(batch="red"), "batch is .red., which is unknown"),
        (dict(every=0), "every is 0"),
        (dict(damping=-1.0), "damping is -1"),
        (dict(groups="released"), "groups is 'released'"),
        (dict(steps="whitened"), "depth is 'group', which weighs groups alone"),
        (dict(example=None), "give it example="),
        (dict(num_classes=None), "give it num_classes="),
        (dict(batch="zipf_tokens"), "zipf_tokens fills rows of ids"),
        (dict(loss_fn=None), "The probe has no loss"),
        (dict(example=OTHER), "cannot be computed on what the probe makes"),
        (dict(loss_fn=lambda p, e: e[0]), "gives no scalar"),
        (dict(batch=lambda key: (jnp.zeros((3, 5)), jnp.zeros(3, jnp.int32))),
         "each needs that many rows"),
        (dict(batch=lambda key: (jnp.zeros((12, 4)), jnp.zeros(12, jnp.int32))),
         "make them alike"),
        (dict(batch=lambda key: jnp.zeros((12, 5))), "make them alike"),
    ],
)  # fmt: skip
def test_a_probe_that_does_not_fit_is_refused_in_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        optimizer(probe(**changes)).init(PARAMS)
    assert "\n" not in str(error.value)


def test_what_goes_wrong_in_a_chain_is_refused():
    with pytest.raises(TypeError, match="must be a dp_ilg.Probe"):
        dp_ilg.probe_importance("pink")
    with pytest.raises(ValueError, match="needs the parameters"):
        tx = optimizer(probe())
        tx.update(per_example(PARAMS, mlp_batch()), tx.init(PARAMS))
    with pytest.raises(ValueError, match="leave one of them out"):
        optimizer(probe(), public_importance=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="no loss"):
        optimizer("probe").init(PARAMS)
    with pytest.raises(ValueError, match="source is 7"):
        optimizer(7)


def test_a_group_without_gradient_falls_to_the_floor_and_is_named():
    params = {"used": jnp.ones(5), "idle": jnp.ones(5)}
    own = probe(loss_fn=lambda p, e: p["used"] @ e[0])
    assert silent_groups(own, params, "leaf") == ["idle"]
    tx = optimizer(own, importance="paper")
    idle, used = tx.importance(tx.init(params))
    assert float(jnp.sqrt(idle / used)) == pytest.approx(0.01)


def test_a_bad_example_of_the_probe_counts_for_nothing():
    def bad(key):
        x = jnp.ones((12, 5)).at[0].set(jnp.nan)
        return x, jnp.zeros(12, jnp.int32)

    tx = optimizer(probe(batch=bad, example=None, depth="kronecker"))
    assert all(bool(jnp.isfinite(x).all()) for x in
               jax.tree.leaves(tx.geometry(tx.init(PARAMS))))  # fmt: skip
