"""Noise that never meets other data: keys of runs, and what a ledger holds them to."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.experiments.audits.subject import release_of, tapped
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import derived_keys, run_keys
from dp_ilg.experiments.runs.runner import Interrupted, run_training, with_seed
from dp_ilg.experiments.runs.trainer import Watch, start, train
from dp_ilg.experiments.sweeps.bench import Bench, _keys
from dp_ilg.training import environment
from dp_ilg.training.checkpoints import read_checkpoint, save_checkpoint
from dp_ilg.training.run_secret import derived_secret
from tests.experiments.runs.test_faults import press
from tests.experiments.runs.test_trainer import (
    SEED,
    at,
    no_report,  # noqa: F401 - a fixture
    tiny,
)

# ------------------------------------------------------------------ derivation


def words(keys):
    return [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]


def another_pixel(job):
    x = np.array(job.data.x_train)
    x[3, 4, 4] += 0.5
    return dataclasses.replace(job, data=dataclasses.replace(job.data, x_train=x))


OTHERS = {
    "epsilon": lambda: (build_job(tiny(privacy__epsilon=3.0)), None),
    "learning rate": lambda: (build_job(tiny(optimizer__learning_rate=0.06)), None),
    "network": lambda: (build_job(tiny(model__hidden=(9,))), None),
    "data": lambda: (another_pixel(build_job(tiny())), None),
    "code": lambda: (build_job(tiny()), "0123456789abcdef"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_runs_under_one_seed_share_no_batches_and_no_noise(other):
    one = words(run_keys(build_job(tiny()), SEED))
    job, code = OTHERS[other]()
    two = words(run_keys(job, SEED, code))
    assert not {*one[1:]} & {*two[1:]}
    assert one[0] == two[0]  # initial parameters meet no data: they may be compared
    assert words(run_keys(build_job(tiny()), SEED)) == one


def test_the_code_is_its_source_packages_settings_and_processor(monkeypatch):
    before, real = environment.code_digest(), environment.environment
    for name in ("dp_ilg source", "jaxlib", "settings", "processor"):
        with monkeypatch.context() as patch:
            found = real() | {name: "1 cores of another XLA_FLAGS=--xla_other"}
            patch.setattr(environment, "environment", lambda found=found: found)
            assert environment.code_digest() != before, name
    flag = "--xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", f"{flag} --xla_x=1")
    four = environment.code_digest()
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    assert environment.code_digest() == four != before  # devices share a run's bits


def test_no_bottleneck_every_bit_of_the_seed_and_every_fact_counts():
    """One bit more in the seed, or in a fact, and half of 256 bits are others."""
    whole = derived_secret(bytes(32), "sampler", {"plan": "a"})
    others = [
        derived_secret((1 << bit).to_bytes(32, "little"), "sampler", {"plan": "a"})
        for bit in range(256)
    ]
    others += [derived_secret(bytes(32), "sampler", {"plan": "a", "data": ""})]
    others += [derived_secret(bytes(32), "sampler", {"plan": "a" + c}) for c in "xy"]
    bits = [(int.from_bytes(o) ^ int.from_bytes(whole)).bit_count() for o in others]
    assert len({whole, *others}) == 1 + len(others)
    # 259 binomial counts of 256 fair bits: 6.5 deviations, level below 1e-7
    assert max(abs(b - 128) for b in bits) < 6.5 * 8
    keys = {words(derived_keys(1 << bit, {}))[1] for bit in range(256)}
    assert len(keys) == 256


def test_lists_of_facts_are_told_apart():
    """No two different sets of facts become one text."""
    secret = bytes(32)
    one = derived_secret(secret, "a", {"b": "c", "d": "e"})
    two = derived_secret(secret, "a", {"b": 'c"],["d","e'})
    assert one != two
    assert derived_secret(secret, "a", {"b": "c"}) != derived_secret(secret, "ab", {})


# ------------------------------------------------------------- the attack it stops


def first_release(job, keys):
    """Release of step 0 in the sum's units, and the clipped sum that is in it."""
    batch = job.data.x_train[:32], job.data.y_train[:32]

    @jax.jit
    def released(keys):
        tx = tapped(job.make_optimizer(keys.optimizer))
        params = job.model.init(keys.params)
        state = tx.init(params)
        clipped = job.grad_fn(params, batch, geometry=tx.geometry(state))
        _, state = tx.update(clipped, state, params)
        return release_of(state), clipped.gradients

    release, total = (ravel_pytree(tree)[0] for tree in released(keys))
    return release * job.plan.batch_size, total


def leak(keys_of):
    """Relative error of the sum that two runs of two epsilons give away."""
    jobs = [build_job(tiny(privacy__epsilon=e)) for e in (1.0, 3.0)]
    (one, total), (two, _) = (first_release(job, keys_of(job)) for job in jobs)
    z1, z2 = (job.plan.gradient_noise_multipliers[0] for job in jobs)
    found = (z1 * two - z2 * one) / (z1 - z2)
    return float(jnp.linalg.norm(found - total) / jnp.linalg.norm(total))


def test_two_runs_under_one_secret_seed_do_not_release_the_clipped_sum():
    assert leak(lambda job: run_keys(job, SEED)) > 1.0
    # what it was: keys of the seed alone give the sum away, so the attack works
    assert leak(lambda job: derived_keys(SEED, {})) < 1e-2


def test_runs_of_a_sweep_have_keys_of_their_own_and_start_alike():
    job = build_job(tiny())
    rates = [tiny(optimizer__learning_rate=rate) for rate in (0.05, 0.06)]
    one, two = (words(_keys(job, config)) for config in rates)
    assert one[0] == two[0] and not {*one[1:]} & {*two[1:]}
    assert one == words(run_keys(job, SEED))  # the run that `train` would make
    found = [Bench(None).run(config, "digits") for config in rates]
    assert [f["status"] for f in found] == ["done", "done"]


# ------------------------------------------------------------------- the ledger


def steps(job, ledger, number, keys):
    """Takes some steps and stops as a killed run does."""
    watch = Watch(stop=iter([False] * (number - 1) + [True]).__next__)
    return train(job, start(job, keys), ledger, watch)


def test_another_learning_rate_is_no_free_repeat(tmp_path):
    """The same ledger, plan, seed and key; only the steps would be other ones."""
    job = build_job(tiny())
    keys = run_keys(job, SEED)
    path = tmp_path / "ledger.jsonl"
    with PrivacyLedger(path, job.plan, key=keys.sampler) as ledger:
        steps(job, ledger, 3, keys)
    other = build_job(tiny(optimizer__learning_rate=0.5), plan=job.plan)
    with PrivacyLedger(path, job.plan, key=keys.sampler, resume=True) as ledger:
        with pytest.raises(ValueError, match="the same noise on another sum"):
            steps(other, ledger, 3, keys)
        with pytest.raises(ValueError, match="the same noise on another sum"):
            steps(another_pixel(job), ledger, 3, keys)
    with PrivacyLedger(path, job.plan, key=keys.sampler, resume=True) as ledger:
        assert steps(job, ledger, 3, keys).step == 3 == ledger.steps


def test_the_ledger_of_a_run_does_not_tell_how_often_it_stopped(tmp_path):
    """Or a repeat from an older checkpoint would be refused that is the same."""
    run_training(tiny(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(tiny(), tmp_path / "run", progress=at(7, press))
    with pytest.raises(Interrupted):
        run_training(tiny(), tmp_path / "run", resume=True, progress=at(13, press))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000013")  # from 10 again
    done = run_training(tiny(), tmp_path / "run", resume=True)
    assert done["steps"] == 20
    ledgers = [tmp_path / name / "ledger.jsonl" for name in ("whole", "run")]
    assert ledgers[0].read_bytes() == ledgers[1].read_bytes()


def test_the_digests_on_file_are_no_hash_that_a_guess_confirms(tmp_path):
    """Data are in them, so they are keyed: two seeds, no digest in common."""
    found = []
    for seed in (1, 2):
        job = build_job(tiny(run__seed=seed))
        keys = derived_keys(7, {})._replace(sampler=jax.random.key(seed))
        path = tmp_path / f"{seed}.jsonl"
        with PrivacyLedger(path, job.plan, key=keys.sampler) as ledger:
            steps(job, ledger, 2, keys)
        lines = map(json.loads, path.read_text().splitlines()[1:])
        found.append({line["released_from"] for line in lines})
    assert len(found[0]) == len(found[1]) == 2 and not found[0] & found[1]


# ------------------------------------------------------------------ old folders


def older(path, seed_fixed):
    """The folder as it was before keys followed the plan."""
    with pytest.raises(Interrupted):
        run_training(tiny(), path, progress=at(7, press))
    step, leaves, facts = read_checkpoint(path / "checkpoints")
    old = {k: v for k, v in facts.items() if k not in ("keys", "trail")}
    old["seed_fixed"] = seed_fixed
    shutil.rmtree(path / "checkpoints")
    tree = [leaves[k] for k in sorted(leaves, key=int)]
    save_checkpoint(path / "checkpoints", step, tree, old)
    return path


def test_an_older_run_under_a_seed_is_refused(tmp_path):
    path = older(tmp_path / "run", True)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="keys follow the seed alone") as caught:
        run_training(with_seed(tiny(), None), path, resume=True)
    assert str(caught.value).count(".") == 1 and str(path) in str(caught.value)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_an_older_run_with_keys_of_its_own_goes_on(tmp_path):
    path = older(tmp_path / "run", False)
    done = run_training(with_seed(tiny(), None), path, resume=True)
    assert done["steps"] == 20


def test_a_seed_is_checked_under_the_code_that_the_run_was_begun_with(
    tmp_path, monkeypatch
):
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_training(tiny(), path, progress=at(7, press))
    real = environment.environment()
    monkeypatch.setattr(
        environment, "environment", lambda *given: real | {"jaxlib": "another"}
    )
    with pytest.raises(ValueError, match="--seed is not the one"):
        run_training(with_seed(tiny(), SEED + 1), path, resume=True)
    assert run_training(tiny(), path, resume=True)["steps"] == 20
