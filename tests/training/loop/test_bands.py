"""A run whose noise is correlated: it resumes to the same bits, and pays as planned."""

import dataclasses

import jax
import numpy as np
import pytest

import dp_ilg
from dp_ilg.sampling.poisson import PoissonSampler
from tests.training.loop import scene

PLAN = scene.made_plan(7, bands=3, noise_multiplier=2.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "ledger.jsonl"
    return scene.trained(scene.training(plan=PLAN), ledger=path)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_was_stopped_ends_with_the_same_bits(whole, stop, tmp_path):
    train = scene.training(plan=PLAN)
    state = train.init(scene.start())
    for lot in train.batches(scene.data(), ledger=tmp_path / "cut.jsonl"):
        state = train.step(state, lot)
        if lot.step == stop - 1:
            train.save(tmp_path / "saved", state)
        if lot.step == stop:
            break
    train = scene.training(plan=PLAN)
    train.init(scene.start())
    state = train.restore(tmp_path / "saved")
    more = dict(ledger=tmp_path / "cut.jsonl", resume=True)
    for lot in train.batches(scene.data(), **more):
        state = train.step(state, lot)
    assert scene.bits(state.params) == scene.bits(whole.params)
    assert train.epsilon(state) == PLAN.epsilon()


def test_lots_are_drawn_from_the_parts_in_turn(tmp_path, monkeypatch):
    """The run's own sampler, of the plan: watched while it trains."""
    seen: dict[int, set] = {}
    real = PoissonSampler.indices

    def watched(self, step):
        found = real(self, step)
        for example in found.tolist():
            seen.setdefault(example, set()).add(step % 3)
        return found

    monkeypatch.setattr(PoissonSampler, "indices", watched)
    scene.trained(scene.training(plan=PLAN), ledger=tmp_path / "ledger.jsonl")
    assert len(seen) > scene.N / 2
    assert all(len(parts) == 1 for parts in seen.values())


def test_the_ledger_charges_cycles(whole, tmp_path):
    with dp_ilg.PrivacyLedger(tmp_path / "own.jsonl", PLAN) as ledger:
        spent = []
        for step in range(PLAN.num_steps):
            ledger.record(step)
            spent.append(ledger.epsilon())
    assert spent[0] == spent[1] == spent[2] < spent[3] == spent[5] < spent[6]
    assert spent[-1] == pytest.approx(PLAN.epsilon())


def test_rows_that_are_kept_go_with_no_bands():
    with pytest.raises(ValueError, match="leave row_budget or bands out"):
        dataclasses.replace(PLAN, row_budget=0.1)


def test_a_run_with_bands_differs_from_one_without_by_its_noise_alone(whole):
    plain = scene.trained(scene.training(plan=scene.made_plan(7, noise_multiplier=2.0)))
    assert scene.bits(plain.params) != scene.bits(whole.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole.params))
