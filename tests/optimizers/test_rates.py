"""A rate of exactly 0 is a rate, given as a number, a schedule or by Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.baselines.table import BASELINES
from dp_ilg.clipping.clip import normalize
from tests.helpers.baseline_cases import NAMES, examples, make, plan_for, zeros
from tests.helpers.models import plan

RATES = {
    "warm-up": optax.linear_schedule(0.0, 1e-2, 2),
    "decay": optax.linear_schedule(1e-2, 0.0, 2),
}


def walk(tx, compiled):
    params = zeros()
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    seen = []
    for seed in range(4):
        updates, state = update(examples(seed), state, params)
        seen.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)]))
    return np.stack(seen)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", RATES)
def test_a_rate_injected_by_optax_is_the_schedule(name, compiled):
    the_plan, key = plan_for("dp_sgd"), jax.random.key(0)
    row = BASELINES["dp_sgd"]
    wanted = walk(row(RATES[name], the_plan, key=key), compiled)
    make_it = lambda learning_rate: row(learning_rate, the_plan, key=key)  # noqa: E731
    injected = optax.inject_hyperparams(make_it)(learning_rate=RATES[name])
    np.testing.assert_allclose(walk(injected, compiled), wanted, rtol=1e-5)
    still = 0 if name == "warm-up" else 3
    assert np.all(wanted[still] == 0) and np.any(wanted[1] != 0)


def test_other_numbers_may_be_injected_and_be_zero():
    the_plan, key = plan_for("dp_sgd"), jax.random.key(0)
    row = BASELINES["dp_sgd"]
    plain = walk(row(0.1, the_plan, key=key), True)
    for momentum in (0.0, 0.9):
        make_it = lambda momentum: row(0.1, the_plan, key=key, momentum=momentum)  # noqa: E731
        got = walk(optax.inject_hyperparams(make_it)(momentum=momentum), True)
        assert np.allclose(got, plain, rtol=1e-5) == (momentum == 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_a_rate_of_zero_and_none_below(name):
    make_it = BASELINES[name]
    key = jax.random.key(0)
    for rate in (0, 0.0, np.float32(0), jnp.zeros(())):
        make_it(rate, plan_for(name), key=key)
    for rate in (-1e-9, np.nan, np.inf, jnp.float32(-1), True):
        with pytest.raises(ValueError, match="learning_rate is .* of at least 0"):
            make_it(rate, plan_for(name), key=key)


def test_no_decay_of_weights_is_one_of_zero():
    key = jax.random.key(0)
    dp_ilg.dp_adam_ilg(0.1, plan(), key=key, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay is -0.1"):
        dp_ilg.dp_adam_ilg(0.1, plan(), key=key, weight_decay=-0.1)


def test_an_aggregate_without_noise_may_be_injected():
    def make_it(noise_multiplier):
        return dp_ilg.differentially_private_aggregate(
            1.0, noise_multiplier, jax.random.key(0), batch_size=12
        )

    got = walk(optax.inject_hyperparams(make_it)(noise_multiplier=0.0), True)
    np.testing.assert_allclose(got, walk(make_it(0.0), True), rtol=1e-6)
    with pytest.raises(ValueError, match="noise_multiplier is -1.0"):
        make_it(-1.0)


TINY = float(np.finfo(np.float32).smallest_normal)


@pytest.mark.parametrize("gamma", [TINY / 2, 1e-42, 5e-324])
def test_a_gamma_that_float32_flushes_to_zero_is_refused(gamma):
    for maker in (normalize, lambda g: make("automatic_clipping", gamma=g)):
        with pytest.raises(
            ValueError, match="gamma is .*flushes to 0; make it at"
        ) as e:
            maker(gamma)
        assert str(e.value).count(". ") == 0


@pytest.mark.parametrize("bound", [1.0, 1e6, 1e30])
@pytest.mark.parametrize("gamma", [TINY, 1e-30, 0.01])
def test_no_gradient_is_too_short_for_a_gamma(gamma, bound):
    """Zero, denormal or tiny: the clipped example is finite and within the bound."""
    params = {"w": jnp.zeros(3)}
    clip = dp_ilg.clip_per_example(bound, clip_mode=normalize(gamma))
    geometry = dp_ilg.Geometry.uniform(params)
    for size in (0.0, 1e-45, 1e-40, 1.1e-38, 1.3e-38, 1e-30, 1e-3, 1.0, 1e30):
        gradients = {"w": jnp.full((1, 3), size, jnp.float32)}
        found, _ = clip.update(gradients, clip.init(params), geometry=geometry)
        norm = np.linalg.norm(np.asarray(found.gradients["w"], np.float64))
        assert norm <= bound
        due = min(bound, 3e38 * size)
        far = size > 1e3 * gamma and size > 1e-37
        far = far and due > 1e-6 * bound  # else it is below the public grid
        assert not far or norm > 0.99 * due
