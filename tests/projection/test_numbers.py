"""Private numbers: one Gaussian each, of the law that is charged, and bounded."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.accounting import accountants
from dp_ilg.projection import numbers
from dp_ilg.projection.numbers import (
    private_accuracy,
    private_histogram,
    private_moments,
    private_quantile,
)

KEYS = jax.random.split(jax.random.key(0), 600)
LEVEL = 1e-4


def normal(sample, scale):
    low, high = scipy.stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], sample.size)
    return low <= np.sum((sample / scale) ** 2) <= high


def test_noise_of_counts_is_the_one_charged():
    labels = np.repeat([0, 1, 2, 9, -1], [50, 30, 20, 5, 5])
    draws = np.stack(
        [
            private_histogram(labels, 20, noise_multiplier=3.0, key=k).values["counts"]
            for k in KEYS[:400]
        ]
    )
    true = np.bincount([*[0] * 50, *[1] * 30, *[2] * 20, *[9] * 5], minlength=20)
    left = draws - true
    assert normal(left, 3.0) and not normal(left, 3.0 * 1.03)
    assert scipy.stats.kstest(left.ravel() / 3.0, "norm").pvalue > LEVEL


def sums(monkeypatch, call):
    """What is noised, by a release without noise."""
    seen = []
    monkeypatch.setattr(
        numbers, "with_noise", lambda total, z, key: seen.append(total.copy()) or total
    )
    call()
    return seen[0]


@pytest.mark.parametrize("seed", range(6))
def test_one_example_moves_what_is_noised_by_one_at_most(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    features = int(rng.integers(1, 7))
    rows = rng.normal(size=(9, features)) * 10.0 ** rng.integers(-3, 12)
    rows[4] = [np.nan, np.inf, -np.inf, 1e308, 3.0, 0.0][seed]
    facts: Any = dict(noise_multiplier=1.0, key=KEYS[0])
    for i in range(9):
        less = np.delete(rows, i, 0)
        calls = {
            "moments": lambda r: private_moments(r, lower=-1.5, upper=2.0, **facts),
            "quantile": lambda r: private_quantile(
                r[:, 0], [-1.0, 0.0, 5.0], 0.5, **facts
            ),
            "histogram": lambda r: private_histogram(
                np.nan_to_num(r[:, 0], posinf=7, neginf=-7).clip(-9, 9).astype(int),
                4,
                **facts,
            ),
            "accuracy": lambda r: private_accuracy(r[:, 0] > 0, **facts),
        }
        for call in calls.values():
            whole = sums(monkeypatch, lambda c=call: c(rows))
            part = sums(monkeypatch, lambda c=call, r=less: c(r))
            assert np.linalg.norm(whole - part) <= 1 + 1e-12


def test_moments_are_those_of_clipped_data():
    x = np.random.default_rng(1).normal([1.0, -2.0, 0.0], [0.5, 2.0, 9.0], (50_000, 3))
    facts: Any = dict(lower=[-5, -5, -5], upper=[5, 5, 5.0])
    found = private_moments(x, noise_multiplier=5.0, key=KEYS[1], **facts).values
    cut = np.clip(x, -5, 5)
    np.testing.assert_allclose(found["mean"], cut.mean(0), atol=0.01)
    np.testing.assert_allclose(found["scale"], cut.std(0), rtol=0.02)


def test_scale_never_becomes_nothing():
    found = private_moments(
        np.zeros((10, 2)), lower=-1, upper=1, noise_multiplier=50.0, key=KEYS[2]
    )
    assert (found.values["scale"] >= 1e-3).all()
    assert (np.abs(found.values["mean"]) <= 1).all()


def test_quantiles_of_the_grid():
    values = np.arange(1000) / 10
    grid = np.linspace(1, 120, 120)
    for share in (0.1, 0.5, 0.9):
        found = private_quantile(
            values, grid, share, noise_multiplier=1.0, key=KEYS[3]
        ).values["quantile"]
        assert abs(found - 100 * share) <= 3
    high = private_quantile(values, [1.0, 2.0], 0.9, noise_multiplier=1.0, key=KEYS[3])
    assert high.values["quantile"] == 2.0


def test_the_plan_charges_them_and_says_so():
    found = private_histogram([0, 1], 2, noise_multiplier=8.0, key=KEYS[4])
    facts: Any = dict(delta=1e-5, num_examples=1000, batch_size=10, num_steps=10)
    bare = dp_ilg.plan_privacy(noise_multiplier=1.0, **facts)
    paid = dp_ilg.plan_privacy(
        noise_multiplier=1.0, prior_releases=found.releases, **facts
    )
    assert paid.epsilon(0) > 0.3 and paid.epsilon() > bare.epsilon()
    assert "histogram of labels (noise multiplier 8)" in str(paid.statement())
    alone = accountants.epsilon(found.event(), 1e-5)
    assert alone == pytest.approx(paid.epsilon(0), rel=1e-2)


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda f: private_moments(np.ones(3), lower=0, upper=1, **f), "shape"),
        (
            lambda f: private_moments(np.ones((2, 2)), lower=1, upper=1, **f),
            "finite b",
        ),
        (
            lambda f: private_moments(np.ones((2, 2)), lower=np.nan, upper=1, **f),
            "finite bounds",
        ),
        (lambda f: private_histogram([0.5], 2, **f), "whole numbers"),
        (lambda f: private_histogram([0], 0, **f), "num_classes is 0"),
        (lambda f: private_quantile([1.0], [2.0, 1.0], 0.5, **f), "must increase"),
        (lambda f: private_quantile([1.0], [1.0], 1.0, **f), "quantile is 1.0"),
        (lambda f: private_accuracy([0.9, 1.0], **f), "one bool a test example"),
        (
            lambda f: private_accuracy(
                np.array([True]), **(f | {"noise_multiplier": 0})
            ),
            "noise_multiplier is 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(act, words):
    with pytest.raises(ValueError, match=words):
        act(dict(noise_multiplier=1.0, key=KEYS[5]))
