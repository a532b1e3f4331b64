"""The audit of a trainer with a probe: when it probes, and what it finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.purity import equations
from dp_ilg.experiments.audits.noise import Noise, gradient_noise
from dp_ilg.experiments.audits.residuals import draws, observe
from dp_ilg.experiments.audits.subject import audited_trainer
from dp_ilg.experiments.config.schema import Config, ModelConfig, OptimizerConfig
from dp_ilg.experiments.config.sources import ProbeConfig
from tests.experiments.audits.test_audit_trainer import holds
from tests.experiments.audits.test_planted_faults import renamed
from tests.helpers.audit_scene import scene_plan, trainer, with_links
from tests.helpers.models import mlp_loss

PROBE = dp_ilg.Probe(
    mlp_loss,
    example=(jnp.zeros(5), jnp.int32(0)),
    batch="gaussian",
    num_classes=3,
    depth="kronecker",
    groups="scores",
    every=2,
    num_examples=8,
)
PLAN = scene_plan(num_steps=3, stages=((3, 1.0),))


@pytest.fixture(scope="module")
def observer():
    return observe(trainer(PLAN, source=PROBE))


def stepped(observer):
    def one(params, state, rows, mask):
        total = observer.others(params, state, rows, mask)
        return *observer.step(params, state, total), jnp.zeros(())

    return one


def eighs(jaxpr):
    return sum(e.primitive.name == "eigh" for e in equations(jaxpr))


def test_runs_side_by_side_probe_only_where_it_is_due(observer):
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jnp.zeros((3, 4), int)
    args = (
        observer.many_params(3),
        jax.eval_shape(observer.states, keys),
        rows,
        rows < 0,
    )
    known = jax.make_jaxpr(observer.over_runs(stepped(observer)))(*args).jaxpr
    choices = [e for e in equations(known) if e.primitive.name == "cond"]
    chosen = sum(
        eighs(branch.jaxpr) for e in choices for branch in e.params["branches"]
    )
    assert chosen == eighs(known) > 0  # a choice of each run would be a select
    assert observer.init is observer.init  # compiled once for all checks


def test_runs_side_by_side_step_as_alone(observer):
    keys = jax.random.split(jax.random.key(0), (2, 3))
    rows, masks, _ = draws(observer.trainer, keys[0], lambda row: row)
    many = jax.jit(observer.over_runs(stepped(observer)))
    at = observer.many_params(3), observer.states(keys[1])
    for t in range(3):
        at = many(*at, rows[t], masks[t])[:2]
    alone = jax.jit(stepped(observer))
    params, state = observer.trainer.params, observer.init(keys[1][1])
    for t in range(3):
        params, state, _ = alone(params, state, rows[t, 1], masks[t, 1])
    for a, b in zip(*map(jax.tree.leaves, (at[0], params)), strict=True):
        np.testing.assert_allclose(a[1], b, atol=2e-5)


def quieter(link, plan):
    stages = tuple((n, 0.97 * z) for n, z in plan.stages)
    less = dataclasses.replace(plan, stages=stages)
    return renamed(dp_ilg.add_importance_noise(less, key=link.key), plan)


@pytest.mark.parametrize("factor", [1.0, 0.97])
def test_the_law_of_its_noise_is_checked(factor, observer):
    if factor != 1:
        sound = observer.trainer
        observer = observe(
            with_links(
                sound,
                lambda links, key: [
                    quieter(x, PLAN) if getattr(x, "role", "") == "noise" else x
                    for x in links
                ],
            )
        )
    assert gradient_noise(Noise(observer, 1)).holds == (factor == 1)


def test_no_canary_refutes_it():
    holds(trainer(PLAN, source=PROBE))


@pytest.mark.parametrize(("every", "within"), [(50, 2), (1, 1)])
def test_a_rare_probe_is_made_within_the_audited_steps(every, within, monkeypatch):
    seen = []
    build = ProbeConfig.build
    monkeypatch.setattr(
        ProbeConfig, "build", lambda self: seen.append(self.every) or build(self)
    )
    config = Config(
        model=ModelConfig(hidden=(2,)),
        optimizer=OptimizerConfig(source="probe"),
        probe=ProbeConfig(every=every),
    )
    audited_trainer(config, max_steps=3)
    assert seen[-1] == within
