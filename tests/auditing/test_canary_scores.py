"""Scores of canaries: ours and jax-privacy's numbers, from one call."""

import importlib.util

import numpy as np
import pytest
import scipy.stats

from dp_ilg.auditing import canary_report, epsilon_lower_bound
from dp_ilg.experiments.audits.one_run import one_run
from dp_ilg.experiments.audits.residuals import observe
from tests.helpers.audit_scene import scene_plan, trainer

theirs = pytest.importorskip("jax_privacy.auditing")


def scores(shift, count=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, count), rng.normal(0, 1, count)


def test_it_says_what_both_libraries_say():
    inside, outside = scores(2.0)
    report = canary_report(inside, outside, delta=1e-3, bootstrap=200)
    auditor = theirs.CanaryScoreAuditor(inside, outside)
    pairs = (inside[:, None] > outside).mean()
    assert report.auroc == pytest.approx(pairs, abs=1e-12)
    assert report.epsilon_one_run == auditor.epsilon_one_run(0.05, 1e-3)
    assert report.tpr_at_fpr[1] == (0.1, auditor.tpr_at_given_fpr(0.1))
    own = epsilon_lower_bound(inside, outside, delta=1e-3)
    assert report.epsilon == own.epsilon


def test_numbers_are_those_of_the_normal_law():
    report = canary_report(*scores(2.0), bootstrap=300)
    area = scipy.stats.norm.cdf(2.0 / np.sqrt(2))
    assert report.auroc_interval[0] < area < report.auroc_interval[1]
    share = scipy.stats.norm.sf(scipy.stats.norm.isf(0.1) - 2.0)
    low, high = report.tpr_intervals[1]
    assert low < share < high and high - low < 0.2
    assert not low < scipy.stats.norm.sf(scipy.stats.norm.isf(0.1) - 1.5) < high


def test_scores_that_say_nothing_bound_nothing():
    covered = 0
    for seed in range(8):
        report = canary_report(*scores(0.0, seed=seed), bootstrap=100)
        assert report.epsilon_one_run < 0.1 and report.epsilon < 0.3
        covered += report.auroc_interval[0] < 0.5 < report.auroc_interval[1]
    assert covered >= 7  # of 8 intervals of 95 %


def test_our_canaries_of_one_run_go_in():
    facts = dict(num_examples=60, batch_size=30, score_budget=0.0)
    plan = scene_plan(**facts, stages=((6, 0.4),))
    found = one_run(observe(trainer(plan, "dp_sgd", engine="vmap", hidden=50)), 200, 0)
    report = canary_report(found.inside, found.outside, delta=1e-5, bootstrap=100)
    assert report.auroc > 0.9
    assert 0.5 < report.epsilon_one_run < plan.epsilon()


def test_the_seed_decides():
    a, b, c = (canary_report(*scores(1.0), bootstrap=50, seed=s) for s in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(inside=[1.0, 2.0]), "at least 4 finite"),
        (dict(inside=[1.0, np.nan, 1.0, 1.0]), "at least 4 finite"),
        (dict(outside=np.ones((4, 2))), "outside has the shape"),
        (dict(confidence=1.0), "confidence is 1.0"),
        (dict(delta=0.0), "delta is 0.0"),
        (dict(false_positive_rates=(0.0,)), "false positive rate is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(facts, words):
    given = dict(inside=np.arange(9.0), outside=np.arange(9.0)) | facts
    with pytest.raises(ValueError, match=words):
        canary_report(given.pop("inside"), given.pop("outside"), **given)


def test_without_jax_privacy_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install jax-privacy"):
        canary_report(*scores(1.0))
