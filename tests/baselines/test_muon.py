"""Muon behind the noise: the same releases, by the row, by hand and in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from dp_ilg.baselines.muon import dp_muon
from dp_ilg.optimizers.behind_noise import behind_noise
from tests.helpers.models import mlp_batch, mlp_params, per_example, plan
from tests.training.loop import scene


def test_the_row_is_optaxs_muon_behind_the_same_noise():
    """With weights of 1 and one key: by `behind_noise`, for matrices and vectors."""
    free = plan(score_budget=0.0)
    own = dp_muon(0.02, free, key=jax.random.key(0), momentum=0.9)
    inner = contrib.muon(0.02, beta=0.9, adam_learning_rate=0.002)
    other = behind_noise(
        inner, free, key=jax.random.key(0), importance="uniform", source="public"
    )
    params, results = mlp_params(), []
    for tx in (own, other):
        state, step = tx.init(params), jax.jit(tx.update)
        for seed in range(2):
            grads = per_example(params, mlp_batch(seed=seed))
            updates, state = step(grads, state, params)
        results.append(updates)
    one, two = (jax.tree.leaves(x) for x in results)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=2e-3, atol=1e-6)


def test_a_kernel_of_a_convolution_steps_by_an_orthogonal_matrix():
    """And by the rate of a schedule: 1 at the first step, 0 at the second."""
    rate = optax.linear_schedule(1.0, 0.0, 1)
    tx = dp_muon(rate, plan(score_budget=0.0), key=jax.random.key(0))
    params = {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}
    grads = jax.tree.map(lambda p: jnp.ones((12, *p.shape)), params)
    step = jax.jit(tx.update)
    updates, state = step(grads, tx.init(params), params)
    values = np.linalg.svd(np.asarray(updates["kernel"]).reshape(18, 4))[1]
    assert 0.5 < values.min() and values.max() < 1.6 * max(1, (18 / 4) ** 0.5)
    updates, _ = step(grads, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


def test_it_runs_through_the_front_door():
    train = scene.training(optimizer=contrib.muon(0.05))
    state = scene.trained(train)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"adam_factor": 0.0}])
def test_numbers_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dp_muon(0.02, plan(score_budget=0.0), key=jax.random.key(0), **options)
