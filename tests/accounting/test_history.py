"""A history told step by step says what a plan of the same steps says."""

import json
import math

import dp_accounting
import jax
import jax.numpy as jnp
import pytest

from dp_ilg.accounting.statements.history import PrivacyHistory
from tests.helpers.models import plan


def told(steps, **names):
    history = PrivacyHistory(**names)
    for rate, z, count in steps:
        for _ in range(count):
            history.step(noise_multiplier=z, sampling_prob=rate)
    return history


STEPS = [(0.012, 2.0, 30), (0.012, 1.0, 20), (0.05, 3.0, 10), (0.012, 1.0, 5)]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_it_says_what_a_plan_says(accountant, relation):
    facts = dict(accountant=accountant, neighboring_relation=relation)
    known = plan(num_steps=50, **facts)
    history = told([(known.sampling_prob, 1.0, 50)], **facts)
    assert history.epsilon(known.accounted_delta) + known.noise_charge.epsilon == (
        pytest.approx(known.epsilon(), rel=1e-12)
    )


def test_renyi_is_dp_accountings_own():
    from dp_accounting.rdp import RdpAccountant

    history = told(STEPS, accountant="rdp")
    theirs = RdpAccountant()
    for rate, z, count in STEPS:
        gaussian = dp_accounting.GaussianDpEvent(z)
        step = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        theirs.compose(step, count)
    assert history.epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=0.02)


def test_equal_steps_in_turn_are_one_entry_and_order_does_not_matter():
    history = told(STEPS)
    assert len(history.state()["steps"]) == 4 and history.num_steps == 65
    assert told(STEPS[::-1]).epsilon(1e-5) == history.epsilon(1e-5)
    less = told(STEPS[:3]).epsilon(1e-5)
    assert 0 == PrivacyHistory().epsilon(1e-5) < less < history.epsilon(1e-5)
    quieter = [(rate, 0.97 * z, count) for rate, z, count in STEPS]
    assert told(quieter).epsilon(1e-5) > 1.02 * history.epsilon(1e-5)


def test_a_step_without_noise_ends_the_guarantee():
    history = told(STEPS)
    history.step(noise_multiplier=0, sampling_prob=1)
    assert history.epsilon(1e-5) == math.inf


def test_its_state_goes_through_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    history = told(STEPS)
    text = json.dumps(history.state())
    assert PrivacyHistory.from_state(text).state() == history.state()
    saver = ocp.Checkpointer(ocp.JsonCheckpointHandler())
    saver.save(tmp_path / "spent", history.state())
    again = PrivacyHistory.from_state(saver.restore(tmp_path / "spent"))
    again.step(noise_multiplier=1.0, sampling_prob=0.012)
    assert again.num_steps == 66 and again.epsilon(1e-5) > history.epsilon(1e-5)


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(noise_multiplier=-1.0, sampling_prob=0.1), "noise_multiplier is -1.0"),
        (dict(noise_multiplier=math.nan, sampling_prob=0.1), "noise_multiplier is nan"),
        (dict(noise_multiplier=1.0, sampling_prob=0.0), "sampling_prob is 0.0"),
        (dict(noise_multiplier=1.0, sampling_prob=1.5), "sampling_prob is 1.5"),
        (dict(noise_multiplier=1.0, sampling_prob=0.1, num_steps=0), "num_steps is 0"),
    ],
)
def test_steps_that_cannot_be_are_refused(facts, words):
    history = PrivacyHistory()
    with pytest.raises(ValueError, match=words):
        history.step(**facts)
    assert history.num_steps == 0


def test_a_traced_step_is_refused():
    history = PrivacyHistory()

    @jax.jit
    def step(z):
        history.step(noise_multiplier=z, sampling_prob=0.1)
        return z

    with pytest.raises(Exception, match=r"[Tt]raced|concrete|noise_multiplier"):
        step(jnp.float32(1.0))
    assert history.num_steps == 0


@pytest.mark.parametrize(
    "state, words",
    [
        ("{", "not valid JSON"),
        ([], "must be what PrivacyHistory.state returned"),
        ({**PrivacyHistory().state(), "format": 9}, "has the format 9"),
        ({**PrivacyHistory().state(), "steps": [[1, 2]]}, r"the step \[1, 2\]"),
        ({**PrivacyHistory().state(), "accountant": "moments"}, "'moments'"),
    ],
)
def test_a_state_that_is_none_is_refused(state, words):
    with pytest.raises(ValueError, match=words):
        PrivacyHistory.from_state(state)
