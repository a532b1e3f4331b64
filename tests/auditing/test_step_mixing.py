"""The audit of a step whose noise is correlated, as a matrix map makes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.auditing import audit_step, step_mixing
from tests.auditing.test_step_audit import EXAMPLE, PARAMS, PLAN, loss
from tests.helpers.mapped import fixed, random_axes


def audited(kind, whitened=False, louder=1.0):
    """The audit of a chain with maps, whose noise is `louder` than the plan's."""
    maps = dp_ilg.AxisMaps.of(PARAMS, random_axes(PARAMS, kind), whitened=whitened)
    groups = dp_ilg.layers.group(PARAMS, "leaf")
    geometry = dp_ilg.Geometry(jnp.array([1.0, 0.5, 2.0]), groups, maps)
    run = dp_ilg.clipped_grad(loss, l2_clip_norm=PLAN.l2_clip_norm)
    sigma = louder * PLAN.noise_multipliers[0]
    used = dataclasses.replace(PLAN, stages=((PLAN.num_steps, float(sigma)),))
    tx = dp_ilg.chain(
        dp_ilg.clip_per_example(PLAN.l2_clip_norm),
        fixed(geometry),
        dp_ilg.add_importance_noise(used, key=jax.random.key(0)),
        optax.sgd(0.1),
        dp_ilg.unwhiten_updates(),
    )

    def step(state, batch, mask):
        params, inner = state
        clipped = run(
            params, batch, geometry=tx.geometry(inner), is_padding_example=mask
        )
        updates, inner = tx.update(clipped, inner, params)
        return optax.apply_updates(params, updates), inner

    found = audit_step(step, (PARAMS, tx.init(PARAMS)), EXAMPLE, PLAN, trials=512)
    return found, {finding.check: finding for finding in found.findings}


CASES = [
    ("matrices", True),
    pytest.param("matrices", False, marks=pytest.mark.slow),
    pytest.param("scales", True, marks=pytest.mark.slow),
    pytest.param("scales", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, whitened", CASES)
def test_a_chain_with_maps_is_not_refuted_and_comes_near(kind, whitened):
    found, by_name = audited(kind, whitened)
    assert not found.failed, str(found)
    share = float(by_name["one example"].found.split()[0])
    assert 0.9 < share < 1.1, str(found)


@pytest.mark.parametrize(
    "kind", ["matrices", pytest.param("scales", marks=pytest.mark.slow)]
)
def test_too_little_noise_behind_maps_is_found(kind):
    found, by_name = audited(kind, louder=0.7)
    assert found.failed
    assert not by_name["one example"].holds, str(found)


def test_distances_are_those_in_the_covariance():
    rng = np.random.default_rng(0)
    turn = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    draws = rng.normal(size=(20_000, 3)) @ turn.T
    moved = np.array([1.0, -1.0, 0.0])
    want = np.linalg.solve((turn @ turn.T)[:2, :2], moved[:2])
    found = step_mixing.solved(draws, moved)
    np.testing.assert_allclose(found[:2], want, rtol=0.05)
    assert found[2] == 0 and step_mixing.solved(draws, np.ones(3))[2] == np.inf
    assert step_mixing.is_mixed(draws) and not step_mixing.is_mixed(draws[:, 1:])
    assert step_mixing.is_readable(draws, 3) and not step_mixing.is_readable(draws, 4)
    small = [
        moved
        @ step_mixing.solved(rng.normal(size=(60, 3)) @ (turn + np.eye(3)).T, moved)
        for _ in range(400)
    ]
    both = turn + np.eye(3)
    truth = moved @ np.linalg.solve(both @ both.T, moved)
    assert abs(np.mean(small) / truth - 1) < 0.05, "a covariance of few keys is biased"
