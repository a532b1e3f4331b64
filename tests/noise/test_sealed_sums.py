"""A clipped sum whose bound something has changed is refused, or released as NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import dp_ilg
from dp_ilg.baselines import BASELINES
from dp_ilg.clipping.lots import sum_over_axis
from dp_ilg.geometry import seal
from tests.helpers.baseline_cases import NAMES, examples, make, plan_for, zeros
from tests.helpers.models import plan, trees_close

PARAMS = {"w": jnp.zeros(4)}
WRONG = "Arithmetic was done on a whole ClippedGrad"
OWN = ["noise", "score"]


def clipped(bound=1.0):
    """A sum of three examples, two of them longer than a bound of 1."""
    rows = jnp.asarray([[3.0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, -7.0]])
    grad_fn = dp_ilg.clipped_grad(lambda p, x: p["w"] @ x, l2_clip_norm=bound)
    return grad_fn(PARAMS, rows, geometry=dp_ilg.Geometry.uniform(PARAMS))


def release(value, link="noise"):
    """What the noise, or a scorer by itself, makes of a sum."""
    key = jax.random.key(0)
    made = dp_ilg.add_importance_noise(plan(score_budget=0.0), key=key)
    if link == "score":
        made = dp_ilg.score_layer_importance("paper", plan(score_budget=0.5), key=key)
    out, state = made.update(value, made.init(PARAMS))
    return out["w"] if link == "noise" else state.average


def on_devices(reduce, link="noise"):
    """Reduces the sum over the axis of a mesh and releases it there."""
    mesh = Mesh(np.array(jax.devices()[:1]), "d")
    own = lambda value: release(reduce(value), link)  # noqa: E731
    share = jax.shard_map(own, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(share)(clipped())


REDUCTIONS = {
    "psum": lambda c: jax.lax.psum(c, "d"),
    "pmean": lambda c: jax.lax.pmean(c, "d"),
    "pmax": lambda c: jax.lax.pmax(jax.tree.map(lambda x: 2 * x, c), "d"),
}


@pytest.mark.parametrize("link", OWN)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_the_whole_over_devices_names_the_right_call(name, link):
    with pytest.raises(ValueError, match=WRONG) as caught:
        on_devices(REDUCTIONS[name], link)
    assert "sum_over_axis(clipped, axis_name)" in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_the_right_call_adds_devices_and_keeps_bound_and_weights():
    halves = jax.tree.map(lambda x: jnp.stack([x, x, x]), clipped())
    geometry = clipped().geometry

    def share(part):
        part = dataclasses.replace(part, geometry=geometry)
        return sum_over_axis(part, "d")

    copies = jax.vmap(share, axis_name="d")(halves)
    total = jax.tree.map(lambda x: x[0], copies)
    trees_close(total.gradients, jax.tree.map(lambda x: 3 * x, clipped().gradients))
    trees_close(total.layer_shares, 3 * clipped().layer_shares)
    assert total.sensitivity() == 1.0
    assert on_devices(lambda c: sum_over_axis(c, "d")).shape == (4,)


ARITHMETIC = {
    "mean": lambda c: jax.tree.map(lambda x: x / 4, c),
    "sum": lambda c: jax.tree.map(jnp.add, c, c),
    "zeros": lambda c: jax.tree.map(jnp.zeros_like, c),
    "scale": lambda c: optax.scale(0.5).update(c, optax.EmptyState())[0],
}


@pytest.mark.parametrize("link", OWN)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_the_whole_tree_is_refused_and_under_jit_poisons(name, link):
    change = ARITHMETIC[name]
    with pytest.raises(ValueError, match=WRONG):
        release(change(clipped()), link)
    try:
        out = jax.jit(lambda c: release(change(c), link))(clipped())
    except ValueError as error:
        assert WRONG in str(error)
    else:
        assert bool(jnp.all(jnp.isnan(out)))


def test_joining_chunks_hides_no_arithmetic():
    fine = clipped()
    assert bool(jnp.all(jnp.isfinite(release(fine + fine))))
    for change in ARITHMETIC.values():
        spoiled = dataclasses.replace(fine, seal=change(fine).seal)
        with pytest.raises(ValueError, match=WRONG):
            release(fine + spoiled)


def test_what_only_moves_a_sum_leaves_it_whole():
    moved = jax.jit(lambda c: c)(jax.device_put(jax.tree.map(jnp.asarray, clipped())))
    scanned, _ = jax.lax.scan(lambda c, _: (c + clipped(), None), moved, None, 2)
    listed = jax.tree.unflatten(*jax.tree.flatten(clipped())[::-1])
    by_hand = dp_ilg.ClippedGrad(PARAMS, jnp.ones(1), clipped().geometry, 1.0)
    for value in (moved, scanned, listed, by_hand, jax.device_get(moved)):
        assert bool(jnp.all(jnp.isfinite(release(value))))
    axes = jax.tree.map(lambda _: 0, clipped())
    assert jax.tree.leaves(axes) == [0] * len(jax.tree.leaves(clipped()))


BAD = [0.0, -1.0, np.nan, np.inf]


@pytest.mark.parametrize("link", OWN)
@pytest.mark.parametrize("value", BAD)
def test_a_bound_that_is_no_positive_number_releases_nothing(value, link):
    fine = clipped()
    by_norm = dataclasses.replace(fine, l2_clip_norm=jnp.float32(value))
    weights = jnp.full_like(fine.geometry.weights, value)
    geometry = dataclasses.replace(fine.geometry, weights=weights)
    by_weight = dataclasses.replace(fine, geometry=geometry)
    for spoiled in (by_norm, by_weight):
        assert bool(jnp.all(jnp.isnan(release(spoiled, link))))
    assert bool(jnp.all(jnp.isfinite(release(fine, link))))


@pytest.mark.parametrize("name", NAMES)
def test_zeroed_nans_release_nothing_from_any_method(name):
    """optax.zero_nans turns the NaN of an unknown bound into a bound of 0."""
    tx, params = make(name), zeros()
    mode = BASELINES[name].clip_mode()
    bound = plan_for(name).l2_clip_norm
    guarded = optax.chain(optax.zero_nans(), tx)
    state = tx.init(params)
    clip = dp_ilg.clip_per_example(bound, clip_mode=mode)

    @jax.jit
    def step(lost):
        own, _ = clip.update(
            examples(0), optax.EmptyState(), geometry=tx.geometry(state)
        )
        given = jnp.where(lost, jnp.nan, own.l2_clip_norm)
        spoiled = dataclasses.replace(own, l2_clip_norm=given)
        updates, _ = guarded.update(spoiled, guarded.init(params), params)
        return [jnp.all(jnp.isnan(x)) for x in jax.tree.leaves(updates)]

    assert all(map(bool, step(True)))
    assert not any(map(bool, step(False)))


def floats_only(change):
    floating = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)  # noqa: E731
    return lambda x: change(x) if floating(x) else x


@pytest.mark.parametrize("change", [lambda x: 0.1 * x, lambda x: x.astype("bfloat16")])
def test_arithmetic_on_the_floats_alone_is_refused_and_under_jit_poisons(change):
    """As filtered trees do it: scaled bound and weights shrink the noise twice."""
    params = {"w": jnp.zeros(4)}
    facts = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=100, batch_size=10, num_steps=5
    )
    geometry = dp_ilg.Geometry.uniform(params)
    noise = dp_ilg.add_importance_noise(facts, key=jax.random.key(0))
    total = dp_ilg.ClippedGrad(
        {"w": jnp.ones(4)}, jnp.ones(1), geometry, jnp.float32(1.0)
    )
    changed = jax.tree.map(
        floats_only(lambda x: change(jnp.asarray(x, jnp.float32))), total
    )
    with pytest.raises(ValueError, match=r"Arithmetic was done|was cast to bfloat16"):
        noise.update(changed, noise.init(params))
    if change(jnp.ones(1)).dtype == jnp.float32:
        update = jax.jit(lambda c, s: noise.update(c, s)[0]["w"])
        assert np.isnan(update(changed, noise.init(params))).all()


def test_a_sum_of_fewer_bits_is_refused():
    params = {"w": jnp.zeros(4)}
    geometry = dp_ilg.Geometry.uniform(params)
    short = {"w": jnp.ones(4, jnp.bfloat16)}
    total = dp_ilg.ClippedGrad(short, jnp.ones(1), geometry, jnp.float32(1.0))
    with pytest.raises(ValueError, match="cast to bfloat16"):
        seal.sound(total)
