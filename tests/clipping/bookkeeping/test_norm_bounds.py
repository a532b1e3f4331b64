"""Norms that are never too small: the search of benchmarks/trust/norm_bounds.py, small.

Its record is benchmarks/results/norm_bounds.jsonl.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.geometry import rounding

ROOT = pathlib.Path(__file__).parents[3] / "benchmarks"
SPEC = importlib.util.spec_from_file_location(
    "norm_bounds", ROOT / "trust" / "norm_bounds.py"
)
assert SPEC and SPEC.loader
norm_bounds = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(norm_bounds)
QUICK = ["few, 2", "gram, 9", "rows, 64", "vmap, 64"]


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in norm_bounds.SETTINGS
    ],
)
def test_no_family_and_no_ascent_finds_a_norm_too_small(name):
    for number in range(2 if name in QUICK else 6):
        found = norm_bounds.block(name, number, "proven")
        assert found["cases"] >= 32 * len(norm_bounds.FAMILIES)
        assert 0.99 < found["largest_ratio"] <= 1, found


def test_the_search_breaks_the_guard_that_was_guessed():
    """Negative control: what was added before there was a proof."""
    setting = norm_bounds.SETTINGS["gram, 20"]
    worst = 0.0
    for number in range(6):
        batch = norm_bounds.draw(np.random.default_rng(number), setting, "alternating")
        worst = max(worst, np.max(norm_bounds.quarter(setting, batch)))
        assert np.max(norm_bounds.proven(setting, batch)) <= 1
    assert worst > 1.02


def test_ordinary_terms_pay_less_than_a_hundred_thousandth():
    for name in ("one term", "few, 2", "formed, 256", "vmap, 64", "rows, 64"):
        setting = norm_bounds.SETTINGS[name]
        batch = norm_bounds.draw(np.random.default_rng(0), setting, "normal")
        assert np.min(norm_bounds.proven(setting, batch)) > 1 - 1e-5, name


def test_the_record_holds_both_searches():
    lines = (ROOT / "results" / "norm_bounds.jsonl").read_text().splitlines()
    rows = [line for line in map(json.loads, lines) if "summary" in line]
    found = {line["summary"]: line for line in rows}
    assert found["proven"]["cases"] >= 300_000
    assert found["proven"]["largest_ratio"] <= 1
    assert set(found["proven"]["by_setting"]) == {*norm_bounds.SETTINGS}
    assert found["quarter"]["largest_ratio"] > 1.02
    page = " ".join((ROOT.parent / "docs" / "rounding.md").read_text().split())
    for name, digits in (("proven", 7), ("quarter", 2)):
        assert f"{found[name]['cases']:,} cases" in page
        assert f"{found[name]['largest_ratio']:.{digits}f}" in page


# The sums that the bounds are about.
@pytest.mark.parametrize("count", [1, 16, 17, 257, 4097, 8192, 30011, 100_000])
def test_sums_in_stages_keep_their_bound(count):
    rng = np.random.default_rng(count)
    values = 10.0 ** rng.uniform(-7, 0, (4, count))
    values[1] = 2.0**-24.6
    values[1, 0] = 1  # one after the other, these are all lost
    values[2] *= rng.choice([-1, 1], count)
    values[3] = 0.1
    values = values.astype(np.float32)
    found = np.float64(jax.jit(rounding.total)(values))
    gap = np.abs(found - np.sum(np.float64(values), axis=1))
    bound = rounding.gamma(rounding.additions(count))
    assert (gap <= bound * np.sum(np.abs(np.float64(values)), axis=1)).all()
    assert rounding.additions(count) < 64 + 12 * np.log2(count)


def test_a_plain_sum_breaks_that_bound():
    """Negative control: added one after the other, as a compiler may."""
    values = np.full(100_000, 2.0**-24.6, np.float32)
    values[0] = 1
    plain = np.float64(np.cumsum(values, dtype=np.float32)[-1])
    true = np.sum(np.float64(values))
    assert true - plain > rounding.gamma(rounding.additions(100_000)) * true


def test_no_compiler_joins_the_stages():
    """One reduction a stage is left in the compiled program."""
    count = 100_000
    program = jax.jit(rounding.total).lower(jnp.ones((3, count))).compile().as_text()
    stages = len(rounding._widths(count))
    assert program is not None and program.count(" reduce(") >= stages == 4


@pytest.mark.parametrize("width", [40, 64, 65, 130, 768])
@pytest.mark.parametrize("terms", [1, 9])
def test_inner_products_keep_their_bound(width, terms):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(3, 2, terms, width)).astype(np.float32)
    y = (1 + 1e-4 * rng.normal(size=x.shape)).astype(np.float32)
    found = np.float64(jax.jit(rounding.inner_products)(x, y))
    gap = np.abs(found - np.einsum("bgta,bgsa->bgts", np.float64(x), np.float64(y)))
    sizes = np.einsum("bgta,bgsa->bgts", np.abs(np.float64(x)), np.abs(np.float64(y)))
    roundings = rounding.inner_roundings(width, 9)
    assert (gap <= rounding.gamma(roundings) * sizes).all()
    assert roundings <= max(width, 72) + 1


def test_powers_of_two_divide_without_rounding():
    sizes = np.array([0, 1e-45, 1e-38, 2.0**-126, 0.3, 1, 3.9, 3e38, np.inf], "f4")
    found = rounding.power_of_two(jnp.asarray(sizes))
    right = [0, 0, 0, 2.0**-126, 0.25, 1, 2, 2.0**127, np.inf]
    assert found.tolist() == right


def test_more_roundings_than_a_float_can_hold_are_refused():
    with pytest.raises(ValueError, match="has no bound in float32; split"):
        rounding.gamma(2**23)
