"""Averages of the iterates: against the sum written out, and through a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.experiments.cli import main as cli

PARAMS = {"w": jnp.zeros(3), "b": jnp.ones((2, 2))}
PLAN = dp_ilg.plan_privacy(
    epsilon=2.0, delta=1e-5, num_examples=1000, batch_size=100, num_steps=30
)


def optimizer(key=0):
    return dp_ilg.dp_adam_ilg(0.1, PLAN, key=jax.random.key(key))


def per_example(params):
    return jax.tree.map(lambda p: jnp.ones((4, *p.shape), p.dtype), params)


def iterates(tx, params, steps):
    """The parameters after each step, and the last state."""
    update = jax.jit(tx.update)
    state, found = tx.init(params), []
    for _ in range(steps):
        updates, state = update(per_example(params), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98])
def test_the_average_is_the_sum_written_out(decay):
    found, state = iterates(dp_ilg.average_iterates(optimizer(), decay), PARAMS, 20)
    kept = dp_ilg.averaged_params(state, found[-1])
    for name in PARAMS:
        expected = np.asarray(PARAMS[name], np.float64)
        for t, params in enumerate(found):
            share = min(decay, (1 + t) / (10 + t))
            expected = share * expected + (1 - share) * np.asarray(params[name])
        np.testing.assert_allclose(kept[name], expected, rtol=1e-5, atol=1e-6)
        if decay == 0.98:
            assert np.abs(expected - found[-1][name]).max() > 1e-2


def test_the_iterates_and_the_geometry_are_those_without_the_average():
    plain, state = iterates(optimizer(), PARAMS, 5)
    tx = dp_ilg.average_iterates(optimizer(), 0.9)
    averaged, outer = iterates(tx, PARAMS, 5)
    for one, other in zip(
        jax.tree.leaves(plain), jax.tree.leaves(averaged), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        optimizer().geometry(state).weights, tx.geometry(outer).weights
    )
    np.testing.assert_array_equal(optimizer().importance(state), tx.importance(outer))


def test_bfloat16_parameters_have_a_float32_average():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    found, state = iterates(dp_ilg.average_iterates(optimizer(), 0.98), params, 20)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(state.average))
    kept = dp_ilg.averaged_params(state, found[-1])
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(kept))
    share, expected = 0.0, np.zeros(3)
    for t, one in enumerate(found):
        share = min(0.98, (1 + t) / (10 + t))
        now = np.asarray(one["w"].astype(jnp.float32))
        expected = share * expected + (1 - share) * now
    # XLA may keep the sum that becomes a parameter in float32 before it is averaged.
    np.testing.assert_allclose(state.average["w"], expected, rtol=4e-3)


def test_past_the_plan_the_average_is_nan_as_the_updates_are():
    tx = dp_ilg.average_iterates(optimizer(), 0.9)
    _, state = iterates(tx, PARAMS, PLAN.num_steps)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.average))
    _, state = tx.update(per_example(PARAMS), state, PARAMS)
    assert all(np.isnan(a).all() for a in jax.tree.leaves(state.average))


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="decay is 1"):
        dp_ilg.average_iterates(optimizer(), 1)
    with pytest.raises(TypeError, match="pass dp_adam_ilg or a dp_ilg.chain"):
        dp_ilg.average_iterates(dp_ilg.clip_per_example(1.0))
    tx = dp_ilg.average_iterates(optimizer())
    with pytest.raises(ValueError, match="got no parameters"):
        tx.update(per_example(PARAMS), tx.init(PARAMS))


def test_a_run_judges_keeps_and_exports_the_average(tmp_path, capsys):
    common = ["train", "--num-steps", "6", "--batch-size", "64", "--seed", "3"]
    found = {}
    for average in ("0.0", "0.9"):
        place = ["--run-dir", str(tmp_path / average), "--json"]
        command = [*common, "--optimizer.average", average, *place]
        assert cli.main(command) == 0
        found[average] = json.loads(capsys.readouterr().out)
        out = str(tmp_path / f"{average}.npz")
        assert cli.main(["export", str(tmp_path / average), out]) == 0
        capsys.readouterr()
    assert found["0.0"]["params_sha256"] != found["0.9"]["params_sha256"]
    last, kept = (np.load(tmp_path / f"{a}.npz") for a in found)
    assert sorted(last) == sorted(kept)
    for name in last:
        assert last[name].shape == kept[name].shape
        assert not np.array_equal(last[name], kept[name])
    from dp_ilg.experiments.runs.evaluation import params_sha256

    nested: dict = {}
    for name in kept:
        *parents, leaf = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = jnp.asarray(kept[name])
    assert params_sha256(nested) == found["0.9"]["params_sha256"]


def test_accuracy_on_held_out_training_examples_is_said_to_be_uncovered(
    tmp_path, capsys
):
    command = ["train", "--num-steps", "1", "--batch-size", "32", "--json"]
    command += ["--run-dir", str(tmp_path / "run"), "--data.validation", "0.2"]
    assert cli.main(command) == 0
    found = capsys.readouterr()
    assert "the guarantee does not cover it" in found.err
    assert "held out" in json.loads(found.out)["data_note"]
