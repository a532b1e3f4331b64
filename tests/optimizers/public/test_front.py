"""Probes and priors through the front door: whole runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from tests.helpers.models import plan

ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
PLAN = plan(num_examples=60, batch_size=12, num_steps=4, score_budget=0.0)
PARAMS = {"w": jnp.ones(3), "v": jnp.ones(2)}


def loss(params, x, key=None):
    drop = 1.0 if key is None else jax.random.uniform(key)
    return jnp.square(params["w"] @ x * drop - params["v"].sum())


def keyed(params, x, key):
    return loss(params, x, key)


def train(source, loss_fn=loss, **options):
    given: dict[str, Any] = dict(seed=0, source=source, layers="leaf") | options
    return dp_ilg.private_training(loss_fn, optax.sgd(0.1), PLAN, **given)


def run(source, steps=4, loss_fn=loss):
    own = train(source, loss_fn)
    state = own.init(PARAMS)
    lots = own.batches(ROWS, ledger=None)
    for lot, _ in zip(lots, range(steps), strict=False):
        state = own.step(state, lot)
    return own, state


PROBE = dp_ilg.Probe(example=jnp.zeros(3), depth="diagonal", every=2, num_examples=8)


@pytest.mark.parametrize("loss_fn", [loss, keyed])
def test_a_probe_is_given_the_loss_of_the_run(loss_fn):
    _, state = run(PROBE, loss_fn=loss_fn)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
    (link,) = [x for x in state.opt_state if type(x).__name__ == "ProbeImportanceState"]
    assert int(link.step) == 4


def test_a_saved_run_goes_on_with_the_same_bits(tmp_path):
    _, whole = run(PROBE)
    own, half = run(PROBE, steps=3)
    own.save(tmp_path, half)
    other = train(PROBE)
    other.init(PARAMS)
    state = other.restore(tmp_path)
    for lot in other.batches(ROWS, ledger=None, resume=True):
        state = other.step(state, lot)
    for a, b in zip(*map(jax.tree.leaves, (whole.params, state.params)), strict=True):
        assert np.array_equal(a, b)


def test_a_probe_without_an_example_is_refused():
    with pytest.raises(ValueError, match="give it example="):
        train("probe").init(PARAMS)
    with pytest.raises(ValueError, match="source is 3"):
        train(3)


def test_a_layer_that_the_probe_does_not_reach_is_said():
    table = train(dp_ilg.Probe(example=jnp.zeros(3)), lambda p, x: p["w"] @ x).check(
        PARAMS, ROWS
    )
    (idle,) = [row for row in table.layers if row.layer == "v"]
    assert "no gradient" in idle.trouble


def test_a_layer_that_is_silent_for_the_probe_alone_is_said():
    def gated(params, x):
        return params["w"] @ x + params["v"].sum() * jax.nn.relu(x[0] - 100.0)

    table = train(dp_ilg.Probe(example=jnp.zeros(3)), gated).check(PARAMS, ROWS)
    (idle,) = [row for row in table.layers if row.layer == "v"]
    assert "no gradient in the probe: weight at the floor" in idle.trouble


def test_an_audit_of_the_step_finds_nothing():
    prior = dp_ilg.Prior({"w": [1.0, 2.0, 4.0]})
    example = np.full(3, 0.5, np.float32)
    report = dp_ilg.auditing.audit_step(train(prior), PARAMS, example, PLAN)
    assert not report.failed, str(report)
