"""DP-PCA: sensitivity, the law of its noise, absent rows, and its price in a plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.projection.pca import (
    PrivatePca,
    noised_second_moment,
    pca_releases,
    private_pca,
)

KEY = jax.random.key(7)


def frobenius_coordinates(matrix):
    """Symmetric matrices as vectors of the same norm."""
    matrix = np.asarray(matrix, np.float64)
    upper = matrix[np.triu_indices(len(matrix), 1)]
    return np.concatenate([np.diag(matrix), np.sqrt(2) * upper])


def bare(x):
    return np.asarray(noised_second_moment(jnp.asarray(x, jnp.float32), 0.0, KEY))


ROWS = {
    "random": np.random.default_rng(0).normal(size=64),
    "one pixel": np.eye(64)[3],
    "huge": np.full(64, 1e37),
    "tiny": np.full(64, 1e-37),
    "mixed": np.geomspace(1e-30, 1e30, 64),
    "constant": np.ones(64),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_example_moves_the_sum_by_at_most_one(name):
    others = np.random.default_rng(1).normal(size=(5, 64))
    moved = bare(np.vstack([others, ROWS[name]])) - bare(
        np.vstack([others, others * 0])[:6]
    )
    size = np.linalg.norm(frobenius_coordinates(moved))
    assert 0.999 < size <= 1, size  # the bound is reached, and not passed


def test_rows_that_are_not_scaled_would_pass_the_bound():
    """The search above can fail: the same rows' raw outer products do."""
    row = ROWS["random"]
    assert np.linalg.norm(np.outer(row, row)) > 10


def whitened(noise_multiplier, draws=25, size=56):
    keys = jax.random.split(KEY, draws)
    nothing = jnp.zeros((1, size))
    found = [noised_second_moment(nothing, noise_multiplier, key) for key in keys]
    assert all(np.array_equal(one, one.T) for one in map(np.asarray, found))
    return np.concatenate([frobenius_coordinates(one) for one in found])


def test_noise_is_the_isotropic_gaussian_on_symmetric_matrices():
    """Chi-square on 39,900 whitened draws at level 1e-3; 3 % in sigma is rejected."""
    values = whitened(3.0)
    assert len(values) > 39_000

    def p_value(sigma):
        total = float(np.sum((values / sigma) ** 2))
        below = stats.chi2.cdf(total, len(values))
        return 2 * min(below, 1 - below)

    assert p_value(3.0) > 1e-3
    assert p_value(3.0 * 0.97) < 1e-3 and p_value(3.0 * 1.03) < 1e-3
    assert stats.kstest(values / 3.0, "norm").pvalue > 1e-3


def test_diagonal_and_the_rest_each_have_their_own_share_of_noise():
    """Noise that is iid in the matrix, or doubled off the diagonal, is rejected."""
    keys = jax.random.split(KEY, 200)
    found = np.stack(
        [noised_second_moment(jnp.zeros((1, 40)), 2.0, key) for key in keys]
    )
    diagonal = found[:, np.arange(40), np.arange(40)].std()
    rest = found[:, *np.triu_indices(40, 1)].std()
    assert diagonal == pytest.approx(2.0, rel=0.03)
    assert rest == pytest.approx(2.0 / np.sqrt(2), rel=0.01)


def test_rows_that_are_not_finite_are_absent():
    x = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
    bad = np.vstack([x, [[np.nan, 1, 1, 1]], [[1, np.inf, 1, 1]], np.zeros((1, 4))])
    np.testing.assert_allclose(bare(bad), bare(x), rtol=1e-5, atol=1e-6)


def test_with_little_noise_it_is_the_pca_of_scaled_rows():
    x = np.random.default_rng(3).normal(size=(500, 6)) * [9, 5, 3, 1, 1, 1]
    pca = private_pca(x, 3, noise_multiplier=1e-3, key=KEY)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(units.T @ units)
    np.testing.assert_allclose(pca.eigenvalues, values[:2:-1] / 500, rtol=1e-3)
    agreement = np.abs(np.sum(pca.components * vectors.T[:2:-1], axis=1))
    np.testing.assert_allclose(agreement, 1, atol=1e-4)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(pca.project(x), x @ pca.components.T, rtol=1e-4)


def test_same_key_same_result_and_other_key_other_noise():
    x = np.random.default_rng(4).normal(size=(50, 5))
    one, same = (private_pca(x, 5, noise_multiplier=2.0, key=KEY) for _ in range(2))
    other = private_pca(x, 5, noise_multiplier=2.0, key=jax.random.key(8))
    np.testing.assert_array_equal(one.components, same.components)
    assert np.abs(one.eigenvalues - other.eigenvalues).max() > 1e-3


def test_its_cost_is_in_the_plan_and_in_the_ledger(tmp_path):
    x = np.random.default_rng(5).normal(size=(1000, 5))
    pca = private_pca(x, 2, noise_multiplier=20.0, key=KEY)
    plan = dp_ilg.plan_privacy(
        epsilon=1.0,
        delta=1e-5,
        num_examples=1000,
        batch_size=100,
        num_steps=10,
        prior_releases=pca.releases,
    )
    assert plan.event().events[0] == pca.event()  # pyright: ignore
    assert plan.prior_releases == pca_releases(20.0)
    with dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", plan) as ledger:
        assert 0 < ledger.epsilon() < plan.epsilon() <= 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_components=5), "num_components is 5, but the data has 4 features"),
        (dict(num_components=0), "num_components is 0, but must be a whole number"),
        (dict(noise_multiplier=0.0), "noise_multiplier is 0.0, but must be a finite"),
        (dict(x=np.zeros((3, 2, 2))), r"shape \(3, 2, 2\), but must have one example"),
        (dict(x=np.zeros((0, 4))), r"shape \(0, 4\), but must have one example a row"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    given = dict(x=np.ones((3, 4)), num_components=2, noise_multiplier=1.0) | changes
    with pytest.raises(ValueError, match=message):
        private_pca(given.pop("x"), given.pop("num_components"), key=KEY, **given)


def test_a_key_is_required():
    with pytest.raises(TypeError, match="key must be one PRNG key, not int"):
        private_pca(np.ones((3, 4)), 2, noise_multiplier=1.0, key=0)
    assert PrivatePca._fields == ("components", "eigenvalues", "noise_multiplier")
