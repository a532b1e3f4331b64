"""Public priors: vectors, scales by hand, refusals, and what a chain makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg import priors
from dp_ilg.geometry.rules import RULES
from dp_ilg.optimizers.behind_noise import behind_noise
from dp_ilg.optimizers.public.axis_scale import axis_scale
from dp_ilg.optimizers.public.readings import READINGS
from tests.helpers.models import plan

EXPONENTS = {"uniform": 0, "paper": 1, "min_noise_energy": 0.5, "equal_snr": 1}
RNG = np.random.default_rng(0)
PARAMS = {"emb": jnp.zeros((6, 2)), "out": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}
SHARES = RNG.uniform(0.1, 2, 6)
FREE = plan(score_budget=0.0, num_steps=6)
SCORED = plan(score_budget=0.1, num_steps=6)


def gradients(seed=1, rows=5):
    rng = np.random.default_rng(seed)

    def make(x):
        return jnp.asarray(rng.normal(size=(rows, *x.shape)), jnp.float32)

    return jax.tree.map(make, PARAMS)


def optimizer(the_plan=FREE, key=0, **options):
    given: dict[str, Any] = dict(layers="leaf", key=jax.random.key(key)) | options
    return dp_ilg.dp_adam_ilg(0.1, the_plan, **given)


# --- the helpers ------------------------------------------------------------------


def test_zipf_is_the_law():
    by_hand = 1 / np.arange(1, 1001) ** 1.1
    assert np.allclose(priors.zipf(1000, 1.1), by_hand / by_hand.sum(), rtol=1e-12)
    shifted = 1 / (np.arange(1, 6) + 2.7)
    assert np.allclose(priors.zipf(5, shift=2.7), shifted / shifted.sum())
    order = priors.zipf([3, 1, 2])
    assert list(np.argsort(-order)) == [1, 2, 0]


def test_occurrence_is_what_drawn_texts_have():
    frequency = priors.zipf(50)
    texts = np.random.default_rng(0).choice(50, (20_000, 30), p=frequency)
    seen = np.stack([(texts == w).any(1).mean() for w in range(50)])
    assert np.abs(seen - priors.occurrence(frequency, 30)).max() < 0.015


def test_a_row_of_a_table_of_columns_is_met_as_often_as_its_column_has_values():
    assert priors.cardinality([2, 5]).tolist() == [0.5] * 2 + [0.2] * 5


def test_fan_in_is_what_gradients_of_random_inputs_have():
    params = {"d": {"kernel": jnp.zeros((400, 3)), "bias": jnp.zeros(3)}}

    def loss(p, x):
        return (x @ p["d"]["kernel"] + p["d"]["bias"]).sum()

    rows = jax.random.normal(jax.random.key(0), (200, 400))
    found = jax.vmap(jax.grad(loss), (None, 0))(params, rows)["d"]
    ratio = jnp.linalg.norm(found["kernel"]) / jnp.linalg.norm(found["bias"])
    wanted = priors.fan_in(params)
    assert ratio == pytest.approx(wanted["d/kernel"] / wanted["d/bias"], rel=0.02)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: priors.zipf(0), "at least 1"),
        (lambda: priors.zipf([0, 1]), "count from 1"),
        (lambda: priors.zipf(3, exponent=-1), "exponent is -1"),
        (lambda: priors.occurrence([1.5], 3), "at most 1"),
        (lambda: priors.idf([-0.1]), "hold -0.1 at place 0"),
        (lambda: priors.cardinality([]), "one size or more"),
        (lambda: priors.frequency([1, np.nan]), "hold nan at place 1"),
        (lambda: priors.frequency("many"), "must be numbers"),
        (lambda: priors.frequency([[1, 2]]), "must be one vector"),
        (lambda: priors.private_counts([[3]], 3), "outside the 3 rows"),
    ],
)
def test_what_is_no_prior_is_refused_in_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


# --- scales of entries ------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(RULES.keys() & EXPONENTS.keys()))
def test_scales_are_the_rule_by_hand(rule):
    raw = SHARES ** (EXPONENTS[rule] / 2)
    share = SHARES / SHARES.sum()
    by_hand = raw * np.sqrt(np.sum(share / raw**2))
    assert np.allclose(axis_scale(RULES[rule], SHARES, 2), by_hand, rtol=1e-5)


@pytest.mark.parametrize("rule", sorted(RULES.keys() & EXPONENTS.keys()))
def test_an_example_as_the_prior_says_keeps_its_norm(rule):
    prior = dp_ilg.Prior({"emb": (SHARES, np.array([1.0, 4.0]))}, rule=rule)
    maps = optimizer(source=prior).geometry(optimizer(source=prior).init(PARAMS))
    expected = np.sqrt(np.outer(SHARES, [1.0, 4.0]))
    leaves = [jnp.asarray(expected, jnp.float32), jnp.ones(3), jnp.ones((2, 3))]
    inside = maps.coordinates.entered(leaves)
    before, after = (float(jnp.linalg.norm(x[0])) for x in (leaves, inside))
    assert after == pytest.approx(before, rel=1e-5)


def test_a_share_of_zero_has_a_ten_thousandth_of_the_largest_scale():
    scales = axis_scale(RULES["paper"], [1.0, 0.0], 3)
    assert float(scales[1] / scales[0]) == pytest.approx(1e-4)


def test_given_scales_are_taken_as_they_are():
    scales = axis_scale("given", [1.0, 3.0, 5.0], 3)
    assert np.allclose(scales / scales[0], [1, 3, 5], rtol=1e-6)


# --- in a chain -------------------------------------------------------------------


def test_the_geometry_is_the_priors_and_nothing_else_changes_it():
    prior = dp_ilg.Prior({"emb": SHARES})
    tx = optimizer(source=prior)
    state = tx.init(PARAMS)
    before = jax.tree.leaves(tx.geometry(state))
    update = jax.jit(tx.update)
    after = [tx.geometry(update(gradients(s), state, PARAMS)[1]) for s in (1, 2)]
    for found in map(jax.tree.leaves, after):
        assert all(np.array_equal(a, b) for a, b in zip(before, found, strict=True))


@pytest.mark.parametrize("rule", sorted(RULES.keys() & EXPONENTS.keys()))
def test_groups_divide_by_noise_energy_not_by_size(rule):
    prior = dp_ilg.Prior({"emb": SHARES}, rule="paper")
    tx = optimizer(source=prior, importance=rule)
    geometry = tx.geometry(tx.init(PARAMS))
    (emb,) = [c[0] for c in geometry.coordinates.back if c[0] is not None]
    energies = np.array([2 * np.sum(np.square(emb)), 3, 6])
    made: Any = RULES[rule]
    raw = made(np.ones(3) / np.sqrt(3), energies)
    by_hand = raw * np.sqrt(np.mean(1 / np.square(raw)))
    assert np.allclose(geometry.weights, by_hand, rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_scores_weigh_groups_and_the_prior_entries(jit):
    prior = dp_ilg.Prior({"emb": SHARES}, groups="scores")
    tx = optimizer(SCORED, source=prior)
    state = tx.init(PARAMS)
    first = tx.geometry(state)
    update = jax.jit(tx.update) if jit else tx.update
    _, state = update(gradients(), state, PARAMS)
    second = tx.geometry(state)
    assert np.array_equal(first.coordinates.back[0][0], second.coordinates.back[0][0])
    assert np.array_equal(first.weights, [1, 1, 1])
    assert not np.allclose(second.weights, 1, atol=0.02)
    shares = tx.importance(state)
    sizes = second.noise_scale() ** 2 / second.weights**2 * jnp.array([12, 3, 6])
    raw = np.sqrt(np.sqrt(shares)) / np.asarray(sizes) ** 0.25
    by_hand = raw * np.sqrt(np.sum(shares / raw**2))
    assert np.allclose(second.weights, by_hand, rtol=1e-4)


def test_scores_are_of_gradients_in_the_priors_scales():
    prior = dp_ilg.Prior({"emb": SHARES}, groups="scores")
    tx = optimizer(SCORED, source=prior)
    geometry = tx.geometry(tx.init(PARAMS))
    rows = gradients()
    inside = geometry.coordinates.entered(jax.tree.leaves(rows))
    norms = np.stack([np.linalg.norm(x.reshape(5, -1), axis=1) for x in inside], 1)
    by_hand = (norms / np.linalg.norm(norms, axis=1, keepdims=True)).sum(0)
    clip = dp_ilg.clip_per_example(1.0)
    total, _ = clip.update(rows, clip.init(PARAMS), geometry=geometry)
    assert np.allclose(total.layer_shares, by_hand, rtol=1e-4)


def test_uniform_rule_with_a_prior_is_dp_adam():
    prior = dp_ilg.Prior({"emb": SHARES})
    found = [
        optimizer(importance="uniform", source=source).update(
            gradients(),
            optimizer(importance="uniform", source=source).init(PARAMS),
            PARAMS,
        )[0]
        for source in (prior, "public")
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(one, other, atol=1e-5)


LINEAR = {"w": jnp.zeros(4), "b": jnp.zeros(())}


def linear_loss(params, example):
    x, y = example
    return jnp.square(params["w"] @ x + params["b"] - y)


def test_whitened_is_a_linear_model_on_scaled_features():
    """``steps="whitened"`` with b is plain training on x / b, noise and all."""
    scales = np.array([0.5, 1.0, 2.0, 4.0])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    y = jnp.asarray(rng.normal(size=8), jnp.float32)
    prior = dp_ilg.Prior({"w": scales}, rule="given", steps="whitened")
    made: dict[str, Any] = dict(
        layers="leaf", key=jax.random.key(3), importance="uniform"
    )
    sgd = optax.sgd(0.05, momentum=0.9)
    scaled = behind_noise(sgd, FREE, source=prior, **made)
    plain = behind_noise(sgd, FREE, source="public", **made)
    b = scaled.geometry(scaled.init(LINEAR)).coordinates.back[1][0]
    per_example = jax.vmap(jax.grad(linear_loss), (None, 0))

    def run(tx, features):
        update = jax.jit(tx.update)
        params: Any = LINEAR
        state = tx.init(LINEAR)
        for _ in range(4):
            rows = per_example(params, (features, y))
            updates, state = update(rows, state, params)
            params = optax.apply_updates(params, updates)
        return params

    one, other = run(scaled, x), run(plain, x / b)
    assert np.allclose(one["w"] * b, other["w"], atol=2e-5)
    assert np.allclose(one["b"], other["b"], atol=2e-5)
    assert not np.allclose(one["w"], other["w"], atol=1e-3)


def test_readings_of_one_release_under_sgd():
    def prior(steps):
        return dp_ilg.Prior({"w": [1.0, 16.0]}, rule="given", steps=steps)

    params, rows = {"w": jnp.zeros(2)}, {"w": jnp.ones((4, 2))}
    found = {}
    for steps in READINGS:
        tx = behind_noise(
            optax.sgd(1.0), FREE, key=jax.random.key(0), source=prior(steps)
        )
        state = tx.init(params)
        b = tx.geometry(state).coordinates.back[0][0]
        found[steps] = jax.jit(tx.update)(rows, state, params)[0]["w"]
    assert np.allclose(found["preconditioned"], found["restored"] / b, rtol=1e-5)
    assert np.allclose(found["whitened"], found["restored"] / b**2, rtol=1e-5)


# --- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"emb": SHARES[:5]}, "has 5 entries, but axis 0 of it has 6"),
        ({"emb": (None, [1.0, 2.0, 3.0])}, "axis 1 of it has 2"),
        ({"emb": (None, None, [1.0])}, "speaks of 3 axes"),
        ({"emb": -SHARES}, "hold -.* at place 0"),
        ({"emb": SHARES * np.nan}, "hold nan at place 0"),
        ({"emb": SHARES * 0}, "0 everywhere"),
        ({"enb": SHARES}, "no parameter; did you mean emb"),
        ({}, "at least one leaf"),
        (SHARES, "at least one leaf"),
        ({"emb": "zipf"}, "must be numbers"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_in_one_sentence(shares, words):
    with pytest.raises(ValueError, match=words) as error:
        optimizer(source=dp_ilg.Prior(shares)).init(PARAMS)
    assert "\n" not in str(error.value)


def test_counts_of_the_private_rows_are_refused():
    counts = priors.private_counts(RNG.integers(0, 6, (9, 3)), 6)
    for make in (
        lambda: dp_ilg.Prior({"emb": counts}),
        lambda: priors.frequency(counts),
        lambda: priors.occurrence(counts, 3),
        lambda: np.asarray(counts),
        lambda: jnp.asarray(counts),
    ):
        with pytest.raises(TypeError, match="made from the training data"):
            make()
    assert "hidden" in repr(counts) and "hidden" in str(counts)


@pytest.mark.parametrize("steps", ["restored", "whitened"])
def test_a_score_around_the_release_stands_beside_a_prior(steps):
    given = {"emb": (SHARES, None), "out/w": (None, np.array([1.0, 4.0, 9.0]))}
    prior = dp_ilg.Prior(given, groups="scores", steps=steps)
    tx = optimizer(SCORED, source=prior, score="signal")
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for step in range(2):
        _, state = update(gradients(step), state, PARAMS)
    geometry = tx.geometry(state)
    assert len(set(np.asarray(geometry.weights).tolist())) == 3  # something was learnt
    maps = geometry.coordinates
    inside = maps.entered(jax.tree.leaves(gradients(9)))
    release = jax.tree.leaves(geometry.release)
    release = release if steps == "whitened" else maps.entered(release)
    squares = np.zeros((3, 5))
    for j, (g, r) in enumerate(zip(inside, release, strict=True)):
        g, r = (np.asarray(x, float).reshape(len(x), -1) for x in (g, r[None]))
        along = g @ r[0] / np.linalg.norm(r)
        squares[j] = np.sum(g**2, axis=1) - along**2
    whole = sum(np.sum(np.square(x.reshape(5, -1)), axis=1) for x in inside)
    total = np.sum(np.sqrt(squares / np.asarray(whole, float)), axis=1)
    clip = dp_ilg.clip_per_example(1.0)
    found, _ = clip.update(gradients(9), clip.init(PARAMS), PARAMS, geometry=geometry)
    np.testing.assert_allclose(found.layer_shares, total, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(groups="released"), "groups is 'released', but must be one of"),
        (dict(steps="white"), "steps is 'white', but must be one of"),
        (dict(rule="papre"), "did you mean paper"),
    ],
)
def test_unknown_words_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        dp_ilg.Prior({"emb": SHARES}, **options)


def test_what_goes_wrong_in_a_chain_is_refused():
    prior = dp_ilg.Prior({"emb": SHARES}, groups="scores")
    with pytest.raises(ValueError, match="2 priors or probes"):
        link = dp_ilg.set_prior(prior)
        rest = dp_ilg.dp_adam_ilg(0.1, FREE, key=jax.random.key(0), source="public")
        dp_ilg.chain(rest.links[0], link, link, *rest.links[1:])
    with pytest.raises(TypeError, match="dp_ilg.Prior of public vectors"):
        dp_ilg.set_prior({"emb": SHARES})
    with pytest.raises(ValueError, match="source is 'prior', which needs vectors"):
        optimizer(source="prior")
