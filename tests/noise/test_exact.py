"""Exact draws: the discrete Gaussian's law, from whole numbers only."""

import decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.noise import exact
from dp_ilg.noise.exact import ExactNoise
from dp_ilg.noise.secure import ExactDraws, SecureNoise
from tests.helpers.models import plan

LEVEL = 1e-4
SECRET = bytes(range(32))
PARAMS = {"w": jnp.zeros((3, 4))}


def words(seed):
    rng = np.random.default_rng(seed)
    return lambda count: rng.integers(0, 2**64, count, np.uint64)


def binomial_accepts(count, size, rate):
    return stats.binomtest(int(count), size, rate).pvalue > LEVEL


@pytest.mark.parametrize("x", [0, 1, 2**39, 2**40 - 1, 700_000_000_000])
@pytest.mark.parametrize("squared", [False, True])
def test_the_factory_has_the_probability_of_an_exponential(x, squared):
    size = 200_000
    found = exact._factory(words(x + squared), np.full(size, x, np.uint64), squared)
    g = x / 2**40
    rate = float(np.exp(-g * g / 2 if squared else -g))
    assert binomial_accepts(found.sum(), size, rate)
    if 0.01 < rate < 0.99:
        assert not binomial_accepts(found.sum(), size, rate**1.03 * 0.98)


def test_one_in_k_is_exact_where_words_do_not_divide():
    """A word above the last multiple of k is drawn again."""
    given = [np.array([2**64 - 1, 3], np.uint64), np.array([6, 7], np.uint64)]
    found = exact._one_in(lambda count: given.pop(0), 3, 2)
    assert found.tolist() == [True, True] and not given


def test_whole_parts_have_their_law_and_open_ones_take_more_bits():
    size = 300_000
    found = np.bincount(exact._whole(words(1), size), minlength=6)[:6]
    rate = np.exp(-(np.arange(60.0) ** 2) / 2)
    rate /= rate.sum()
    expected = np.append(rate[:5], rate[5:].sum()) * size
    observed = np.append(found[:5], size - found[:5].sum())
    assert stats.chisquare(observed, expected).pvalue > LEVEL
    _, first = exact._cumulative()
    sums = exact._cumulative()[0]
    rest = sums[0] & (2**448 - 1)
    for extra, expected_part in ((rest, 1), (rest - 1, 0)):
        parts = [extra >> (64 * i) & (2**64 - 1) for i in reversed(range(7))]
        script = [first[:1], np.array(parts, np.uint64)]
        found = exact._whole(lambda count, s=script: s.pop(0), 1)
        assert found.tolist() == [expected_part]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_small_cases_against_the_exact_law(monkeypatch, bits):
    """Standard deviation 2, 4, 8: chi-square of every integer; 3 % refused."""
    monkeypatch.setattr(exact, "BITS", bits)
    sample = exact.discrete_gaussians(words(bits), 400_000)
    spread = 2**bits
    support = np.arange(-4 * spread, 4 * spread + 1)

    def p_value(sigma):
        rate = np.exp(-(support**2) / (2 * sigma**2))
        rate /= np.exp(
            -(np.arange(-99 * spread, 99 * spread) ** 2) / 2 / sigma**2
        ).sum()
        observed = np.array([(sample == k).sum() for k in support])
        rest = sample.size - observed.sum()
        expected = np.append(rate, 1 - rate.sum()) * sample.size
        return stats.chisquare(np.append(observed, rest), expected).pvalue

    assert p_value(spread) > LEVEL
    assert p_value(spread * 1.03) < LEVEL and p_value(spread * 0.97) < LEVEL


def test_draws_of_a_step_are_standard_normal_on_the_grid():
    params = {"w": jax.ShapeDtypeStruct((300, 400), jnp.float32)}
    geometry = dp_ilg.Geometry.uniform({"w": jnp.zeros(1)})
    found = ExactNoise(secret=SECRET).draws(0, params, geometry).gradient["w"]
    sample = np.asarray(found, np.float64).ravel() / 2**27
    low, high = stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], sample.size)
    accepts = lambda s: low <= np.sum((sample / s) ** 2) <= high  # noqa: E731
    assert accepts(1.0) and not accepts(0.97) and not accepts(1.03)
    assert stats.kstest(sample, "norm").pvalue > LEVEL


def test_a_rounded_gaussian_is_as_close_as_the_module_says():
    """Exact pmf ratio at 0, 3 and 9 deviations, to 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        h = decimal.Decimal(2) ** -exact.BITS
        for z in (0, 3, 9):
            rounded = 1 + h * h / 24 * (z * z - 1)  # over the density at the centre
            assert abs(rounded - 1) < decimal.Decimal("3e-24")
        assert abs(h * h / 24) * decimal.Decimal(2).sqrt() < decimal.Decimal("1e-25")


def draws(step=0, secret=SECRET):
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    return ExactNoise(secret=secret).draws(step, PARAMS, geometry)


def test_draws_are_a_function_of_secret_and_step():
    one, again = draws(3), draws(3)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(again)))
    for other in (draws(4), draws(3, bytes(32))):
        assert not np.array_equal(one.gradient["w"], other.gradient["w"])
    usual = SecureNoise(secret=SECRET).draws(3, PARAMS, dp_ilg.Geometry.uniform(PARAMS))
    assert not np.array_equal(one.gradient["w"], usual.gradient["w"])
    assert repr(ExactNoise(secret=SECRET)) == "ExactNoise(secret=<hidden>)"


@pytest.mark.parametrize("asked", ["plan", "keyword"])
def test_exact_noise_takes_exact_draws_only(asked):
    the_plan = plan(score_budget=0.2, exact_noise=asked == "plan")
    word: Any = {"noise": "exact"} if asked == "keyword" else {}
    tx = dp_ilg.dp_adam_ilg(0.1, the_plan, key=jax.random.key(0), **word)
    state, grads = tx.init(PARAMS), {"w": jnp.ones((6, 3, 4))}
    given = draws()
    assert isinstance(given, ExactDraws)
    updates, _ = jax.jit(tx.update)(grads, state, PARAMS, noise=given)
    assert bool(jnp.isfinite(updates["w"]).all())
    late, _ = jax.jit(tx.update)(grads, state, PARAMS, noise=draws(1))
    assert bool(jnp.isnan(late["w"]).all())
    usual = SecureNoise(secret=SECRET).draws(0, PARAMS, tx.geometry(state))
    for wrong in (None, usual):
        with pytest.raises(TypeError, match="exact noise needs ExactDraws"):
            tx.update(grads, state, PARAMS, noise=wrong)


def test_a_plan_of_exact_noise_pays_next_to_nothing_and_allows_no_other():
    """For the 31 bits that hold a draw, and the grid of 2^-40."""
    the_plan = plan(exact_noise=True)
    paid = the_plan.noise_charge
    assert paid.epsilon == 1e-15 and 0 < paid.delta < 1e-30
    assert 2 * stats.norm.sf(exact._LARGEST / 2**27) < 4e-55
    few = plan(exact_noise=True, delta=1e-28, num_parameters=10**6, accountant="rdp")
    assert 0 < few.accounted_delta < 1e-28
    with pytest.raises(ValueError, match="fewer parameters"):
        plan(exact_noise=True, delta=1e-33)
    assert "exact sampler" in str(the_plan.statement())
    with pytest.raises(ValueError, match="exact_noise=True"):
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0), noise="default")
    with pytest.raises(ValueError, match="must be 'default' or 'exact'"):
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0), noise="secure")
