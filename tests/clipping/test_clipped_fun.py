"""Clipped sums of any function: the oracle's to rounding, and always bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.clipped_fun import clipped_fun
from dp_ilg.sampling.poisson import PoissonSampler

RNG = np.random.default_rng(0)
ROWS = {
    "x": jnp.asarray(RNG.normal(size=(13, 4)) * 3, jnp.float32),
    "y": jnp.asarray(RNG.integers(0, 5, 13), jnp.int32),
}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)}


def counts(_, example):
    return jax.nn.one_hot(example["y"], 5, dtype=jnp.int32)


def moments(_, example):
    return {"first": example["x"], "second": jnp.outer(example["x"], example["x"])}


def fisher(params, example):
    """Squares of the gradient of the log-likelihood, one example's."""

    def loss(p):
        return -jax.nn.log_softmax(example["x"] @ p["w"])[example["y"]]

    return jax.tree.map(jnp.square, jax.grad(loss)(params))


def half(_, example):
    return example["x"].astype(jnp.bfloat16)


FUNCTIONS = {"counts": counts, "moments": moments, "fisher": fisher, "half": half}


def oracle(fun, bound, rows, mask=None):
    values = jax.vmap(lambda e: fun(PARAMS, e))(rows)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(values)]
    norms = np.sqrt(sum((x.reshape(len(x), -1) ** 2).sum(1) for x in leaves))
    scale = np.minimum(1, bound / np.maximum(norms, 1e-30))
    if mask is not None:
        scale = np.where(mask, 0, scale)
    return [np.tensordot(scale, x, 1) for x in leaves]


@pytest.mark.parametrize("engine", ["vmap", "exact"])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_it_is_the_oracles_sum(name, compiled, size, engine):
    sums = clipped_fun(
        FUNCTIONS[name], l2_clip_norm=1.5, microbatch_size=size, engine=engine
    )
    mask = jnp.arange(13) % 4 == 1
    call = lambda b, m: sums(PARAMS, b, is_padding_example=m)  # noqa: E731
    found = (jax.jit(call) if compiled else call)(ROWS, mask)
    for ours, theirs in zip(
        jax.tree.leaves(found.gradients),
        oracle(FUNCTIONS[name], 1.5, ROWS, np.asarray(mask)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
        assert ours.dtype == jnp.float32


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_one_example_moves_the_sum_by_the_bound_at_most(name, scale):
    rows = {"x": ROWS["x"] * scale, "y": ROWS["y"]}
    sums = clipped_fun(FUNCTIONS[name], l2_clip_norm=1.0)
    call = jax.jit(lambda m: sums(PARAMS, rows, is_padding_example=m))
    nobody = jnp.zeros(13, bool)
    whole = call(nobody)
    for i in range(13):
        less = call(nobody.at[i].set(True))
        gaps = jax.tree.map(
            lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64),
            whole.gradients,
            less.gradients,
        )
        length = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gaps)))
        assert length <= 1 + 2e-6


def test_values_that_are_not_finite_are_absent():
    sums = clipped_fun(lambda _, x: 1 / x, l2_clip_norm=1.0)
    found = sums(None, jnp.array([0.0, 2.0, jnp.nan]))
    assert float(found.gradients) == pytest.approx(0.5)


def test_noise_of_the_plan_goes_on_it_in_three_lines():
    plan = dp_ilg.plan_privacy(
        noise_multiplier=2.0, delta=1e-5, num_examples=13, batch_size=13, num_steps=1,
        l2_clip_norm=3.0, score_budget=0,
    )  # fmt: skip
    sums = clipped_fun(lambda _, e: jnp.tile(e["x"], 5000), l2_clip_norm=3.0)
    noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(1))
    state = noise.init(sums.like(None, ROWS))
    mean, _ = jax.jit(lambda b: noise.update(sums(None, b), state))(ROWS)
    (known,) = oracle(lambda _, e: jnp.tile(e["x"], 5000), 3.0, ROWS)
    left = (np.asarray(mean) * 13 - known) / 6.0
    assert left.std() == pytest.approx(1.0, abs=0.02)
    assert not left.std() == pytest.approx(1.03, abs=0.02)


def test_sealed_batches_of_a_sampler_bring_their_mask():
    sampler = PoissonSampler(13, 0.5, key=1, chunk_size=13)
    (chunk,) = sampler.chunks(0)
    batch = chunk.take(jax.tree.map(np.asarray, ROWS))
    found = clipped_fun(counts, l2_clip_norm=1.0)(None, batch)
    drawn = len(sampler.indices(0))
    assert float(found.gradients.sum()) == pytest.approx(drawn, rel=1e-5)


def test_arithmetic_before_the_noise_is_refused():
    sums = clipped_fun(counts, l2_clip_norm=1.0)
    found = jax.tree.map(lambda x: x / 13, sums(None, ROWS))
    plan = dp_ilg.plan_privacy(
        noise_multiplier=2.0, delta=1e-5, num_examples=13, batch_size=13, num_steps=1
    )
    noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(1))
    with pytest.raises(ValueError, match="clipped"):
        noise.update(found, noise.init(sums.like(None, ROWS)))


@pytest.mark.parametrize(
    "facts, error, words",
    [
        (dict(fun=3), TypeError, "fun is int"),
        (dict(l2_clip_norm=-1.0), ValueError, "l2_clip_norm is -1.0"),
        (dict(engine="bookkeeping"), ValueError, "must be 'vmap' or 'exact'"),
        (dict(clip_mode="hard"), ValueError, "hard"),
        (dict(microbatch_size=0), ValueError, "microbatch_size is 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(facts, error, words):
    given = dict(fun=counts, l2_clip_norm=1.0) | facts
    with pytest.raises(error, match=words):
        clipped_fun(given.pop("fun"), **given)


def test_a_value_without_real_numbers_is_refused():
    for fun in (lambda _, e: None, lambda _, e: e["x"] * 1j):
        with pytest.raises(TypeError, match="no real arrays"):
            clipped_fun(fun, l2_clip_norm=1.0)(None, ROWS)
