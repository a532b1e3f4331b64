"""Audits of correlated noise: sound trainers hold, and faults are found."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.audits.canaries import attacks
from dp_ilg.experiments.audits.one_run import one_run
from dp_ilg.experiments.audits.report import CHECKS, gather
from dp_ilg.experiments.audits.residuals import observe
from dp_ilg.experiments.audits.subject import scene_plan as small
from dp_ilg.sampling.poisson import PoissonSampler
from tests.experiments.audits.test_audit_trainer import bounds
from tests.helpers.audit_scene import scene_plan, trainer

THREE = (1.0, 0.75, 0.5)
QUICK = [name for name in CHECKS if name not in ("tail of the noise", "any order")]


def failed(audited, names=tuple(QUICK)):
    evidence = gather(audited, seed=1)
    return {name for name in names if not CHECKS[name](evidence).holds}


@pytest.fixture(scope="module")
def sound():
    return trainer(scene_plan(strategy=THREE))


def test_a_sound_trainer_with_bands_passes_every_check(sound):
    assert failed(sound) == set()


def test_a_sampler_without_parts_is_found(sound):
    plain = dataclasses.replace(sound.plan, strategy=())
    audited = dataclasses.replace(
        sound, sampler=lambda key: PoissonSampler.for_plan(plain, key=key)
    )
    names = ("turns of the parts", "inclusion frequency", "noise of the gradient")
    assert {"turns of the parts"} <= failed(audited, names) <= set(names[:2])


@pytest.mark.parametrize("strategy", [(), (1.0, 0.5, 0.25), (1.0, 0.75)])
def test_noise_of_another_strategy_is_found(sound, strategy):
    """Independent noise as short as a plan without bands has it, above all."""
    other = dataclasses.replace(sound.plan, strategy=strategy)
    wrong = dataclasses.replace(
        trainer(other), plan=sound.plan, sampler=sound.sampler, keys=sound.keys
    )
    names = ("noise of the gradient", "independence of the noise")
    assert failed(wrong, names)


def test_the_bound_is_near_the_claim_where_the_claim_is_nearly_exact():
    """Whole parts, four cycles: Gaussians, but for the block that the end cuts."""
    known = scene_plan(
        num_examples=12,
        batch_size=6,
        num_steps=8,
        delta=0.01,
        score_budget=0.0,
        stages=((8, 2.0),),
        strategy=(1.0, 0.75),
    )
    found = attacks(observe(trainer(known, "dp_sgd", engine="vmap")), 500, 0)
    seen = [a for a in found if a.adversary == "releases"]
    gaps = [np.mean(a.inside) - np.mean(a.outside) for a in seen]
    spreads = [np.var(a.inside) / 2 + np.var(a.outside) / 2 for a in seen]
    best = (1 + (3 + 1 / 1.5625) / 4) / 2  # of mu^2: half the runs' last block is cut
    assert 0.85 * best < np.mean(gaps) < 1.15 * best  # the first draw alone: 0.64
    assert np.mean(spreads) == pytest.approx(best, rel=0.15)


def test_noise_too_short_by_the_length_of_the_strategy_breaks_the_claim():
    known = scene_plan(
        num_examples=12,
        batch_size=6,
        num_steps=2,
        delta=0.01,
        score_budget=0.0,
        stages=((2, 1.0),),
        strategy=(1.0, 0.875),
    )
    third = dataclasses.replace(known, stages=((2, 0.5),))
    leaky = dataclasses.replace(trainer(third, "dp_sgd", engine="vmap"), plan=known)
    found = bounds(leaky, runs=1000)["least noised layer", "releases"]
    assert found["if_gaussian"] > known.epsilon()


def test_one_run_holds_and_finds_a_tenth_of_the_noise():
    theirs = pytest.importorskip("jax_privacy.auditing")
    facts = dict(num_examples=90, batch_size=30, score_budget=0.0, strategy=THREE)
    claimed = scene_plan(**facts, stages=((6, 4.0),))

    def bound(one):
        found = one_run(observe(one), 200, 0)
        assert np.isfinite(found.inside).all()
        auditor = theirs.CanaryScoreAuditor(found.inside, found.outside)
        return auditor.epsilon_one_run(0.05, claimed.delta)

    options: Any = dict(engine="vmap", hidden=50)
    quieter = dataclasses.replace(claimed, stages=((6, 0.4),))
    sound, leaky = (trainer(p, "dp_sgd", **options) for p in (claimed, quieter))
    assert bound(sound) <= claimed.epsilon() < bound(leaky)


@pytest.mark.parametrize("bands", [2, 8, 16])
def test_a_scene_keeps_bands_and_has_parts_for_them(bands):
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=4096, batch_size=256,
        num_steps=300, bands=bands,
    )  # fmt: skip
    found = small(plan, 5)
    assert found.strategy == plan.strategy and found.num_steps == max(5, bands)
    assert found.bands * found.batch_size <= found.num_examples
