"""The search of benchmarks/trust/sensitivity.py, small; and that it would find a break.

Its record of 100,000 cases is benchmarks/results/audit_sensitivity.jsonl.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg

ROOT = pathlib.Path(__file__).parents[2] / "benchmarks"
SPEC = importlib.util.spec_from_file_location(
    "audit_sensitivity", ROOT / "trust" / "sensitivity.py"
)
assert SPEC and SPEC.loader
audit_sensitivity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit_sensitivity)


def test_a_small_search_stays_within_the_bound_and_comes_near_it():
    found = audit_sensitivity.search(1400, seed=1, ascent=2)
    assert found["cases"] >= 1400
    assert 0.9999 < found["largest_ratio"] <= audit_sensitivity.LIMIT
    assert 0.9999 < found["largest_share"] <= audit_sensitivity.LIMIT


@pytest.mark.parametrize("strategy", ["cancelling", "weights at floor and ceiling"])
def test_the_search_finds_a_clip_in_another_norm(strategy):
    """Clipped in weights that are not those of the measure, a bound breaks."""
    setting = audit_sensitivity.Setting("matrices", "float32", "joint", False)
    params, groups, *_ = audit_sensitivity.clippers(setting)
    make = audit_sensitivity.STRATEGIES[strategy]
    batch = make(np.random.default_rng(0), params, groups)
    plain = batch._replace(weights=jnp.ones_like(batch.weights))
    weights = np.asarray(batch.weights, np.float64)
    one, other = audit_sensitivity.clippers(setting)[2](*plain)
    gaps = [
        np.asarray(one.gradients[n], np.float64) - np.asarray(other.gradients[n])
        for n in sorted(params)
    ]
    moved = np.sqrt(audit_sensitivity.squares(groups, gaps, weights))
    assert np.max(moved / np.asarray(batch.bound)) > 1.5


def test_the_search_finds_a_margin_that_is_missing(monkeypatch):
    """With a bound 0.001 % too large the ratio exceeds the limit."""
    setting = audit_sensitivity.Setting("wide", "float32", "joint", False)
    params, groups, *_ = audit_sensitivity.clippers(setting)
    batch = audit_sensitivity.cancelling(np.random.default_rng(0), params, groups)
    loose = batch._replace(bound=batch.bound * (1 + 1e-5))
    moved, _ = audit_sensitivity.ratios(setting, loose)
    bound = np.asarray(batch.bound, np.float64) / np.asarray(loose.bound, np.float64)
    assert np.max(moved / bound) > audit_sensitivity.LIMIT


def test_distances_are_those_of_the_definition():
    setting = audit_sensitivity.Setting("matrices", "float32", "joint", True)
    params, groups, *_ = audit_sensitivity.clippers(setting)
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(1, *params[n].shape)) for n in sorted(params)]
    weights = rng.uniform(0.5, 2, (1, len(groups.names)))
    pieces = [leaves[0][0, :1], leaves[0][0, 1:2], leaves[0][0, 2:], *leaves[1:]]
    expected = sum(
        np.sum(piece**2) / w**2 for piece, w in zip(pieces, weights[0], strict=True)
    )
    found = audit_sensitivity.squares(groups, leaves, weights)
    assert found[0] == pytest.approx(expected, rel=1e-12)


def test_the_record_holds_a_hundred_thousand_cases():
    lines = (ROOT / "results" / "audit_sensitivity.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    assert found["cases"] >= 100_000
    assert found["largest_ratio"] <= audit_sensitivity.LIMIT
    assert found["largest_share"] <= audit_sensitivity.LIMIT
    assert set(found["by_strategy"]) == {
        *audit_sensitivity.STRATEGIES,
        "gradient ascent",
    }


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("place", [0, 4095])
def test_small_entries_are_not_lost_beside_a_large_one(engine, place):
    """Found by `dp-ilg audit`: a sum one after the other lost 1.3e-5 of the norm."""
    entries = np.full(8192, 2.0**-12.6, np.float32)
    entries[place] = 1
    params = {"w": jnp.zeros(8192)}
    grad_fn = dp_ilg.clipped_grad(
        lambda p, x: jnp.sum(p["w"] * x), l2_clip_norm=0.5, engine=engine
    )
    geometry = dp_ilg.Geometry.uniform(params)
    found = jax.jit(grad_fn)(params, jnp.asarray(entries[None]), geometry=geometry)
    length = np.linalg.norm(np.asarray(found.gradients["w"], np.float64))
    assert 0.9999 < length / 0.5 <= audit_sensitivity.LIMIT
