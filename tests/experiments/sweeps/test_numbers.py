"""The numbers of a comparison, and what a run of a sweep is made of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from dp_ilg.experiments.config.schema import (
    Config,
    DataConfig,
    PrivacyConfig,
    RunConfig,
)
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.data.holdout import hold_out
from dp_ilg.experiments.runs import job
from dp_ilg.experiments.runs.runner import run_training
from dp_ilg.experiments.sweeps.bench import Bench
from dp_ilg.experiments.sweeps.check import read_sweep
from dp_ilg.experiments.sweeps.runs import cells, config_key, tuning_runs
from dp_ilg.experiments.sweeps.statistics import Difference, paired_difference
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture

SWEEPS = Path(__file__).parents[3] / "configs" / "sweeps"
ONE = {0: 90.0, 1: 91.0, 2: 89.5, 3: 90.2, 4: 90.9, 7: 50.0}
TWO = {4: 90.1, 3: 89.9, 2: 89.4, 1: 90.2, 0: 89.6, 8: 20.0}
TINY = Config(
    privacy=PrivacyConfig(num_steps=3, batch_size=64, accountant="rdp"),
    run=RunConfig(seed=5),
)


def test_the_paired_interval_is_scipys():
    found = paired_difference(ONE, TWO)
    pairs = [np.array([d[seed] for seed in range(5)]) for d in (ONE, TWO)]
    paired: Any = stats.ttest_rel(pairs[0], pairs[1])
    low, high = paired.confidence_interval(0.95)
    assert found is not None and found.pairs == 5
    assert found.low == pytest.approx(low) and found.high == pytest.approx(high)
    assert found.mean == pytest.approx(np.mean(np.subtract(*pairs)))
    apart: Any = stats.ttest_ind(pairs[0], pairs[1])
    wide = apart.confidence_interval(0.95)
    assert found.high - found.low < 0.9 * (wide.high - wide.low)  # not unpaired
    assert found.verdict() == "above"
    other = paired_difference(TWO, ONE)
    assert other is not None and other.verdict() == "below"
    assert other.mean == pytest.approx(-found.mean)


def test_intervals_cover_the_truth_in_95_of_100_cases():
    """Level 1e-6 over 2,000 cases; a normal quantile in place of t is rejected."""
    rng = np.random.default_rng(0)
    shared = rng.normal(90, 3, size=(2000, 5, 1))  # of a seed, for both methods
    drawn = shared + rng.normal(0, 1, size=(2000, 5, 2)) + [0.5, 0]
    cover, narrow = 0, 0
    for case in drawn:
        one, two = (dict(enumerate(column)) for column in case.T.tolist())
        found = paired_difference(one, two)
        assert found is not None
        cover += found.low <= 0.5 <= found.high
        half = (found.high - found.low) / 2 * 1.96 / stats.t.ppf(0.975, 4)
        narrow += abs(found.mean - 0.5) <= half
    ends = stats.binom.ppf([5e-7, 1 - 5e-7], 2000, 0.95)
    assert ends[0] <= cover <= ends[1] and not ends[0] <= narrow <= ends[1]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-1, 1, "tie"), (0.1, 1, "above"), (-1, -0.1, "below"), (0.0, 1, "tie")],
)
def test_a_verdict_needs_an_interval_without_zero(low, high, verdict):
    assert Difference((low + high) / 2, float(low), float(high), 5).verdict() == verdict


def test_one_pair_says_nothing_and_none_is_none():
    single = paired_difference({0: 2.0}, {0: 1.0, 1: 3.0})
    assert single is not None and single.mean == 1 and single.verdict() == "tie"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_held_out_examples_are_neither_trained_on_nor_tests():
    digits = load_dataset("digits")
    split = hold_out(digits, 0.25)
    assert (len(split.y_train), len(split.y_test)) == (1078, 359)
    rows = {row.tobytes() for row in np.asarray(digits.x_train)}
    parts = [
        {row.tobytes() for row in np.asarray(x)} for x in (split.x_train, split.x_test)
    ]
    assert parts[0] | parts[1] == rows and not parts[0] & parts[1]
    assert not parts[1] & {row.tobytes() for row in np.asarray(digits.x_test)}
    again = hold_out(digits, 0.25)
    assert (again.y_test == split.y_test).all() and "held out" in split.note
    assert abs(np.mean(split.y_test == 3) - np.mean(digits.y_train == 3)) < 0.05
    with pytest.raises(ValueError, match="holds out 0 of 1437 examples"):
        hold_out(digits, 1e-6)


def test_tuning_never_touches_the_test_part(monkeypatch):
    """The test part is emptied: whoever reads it has nothing to count."""
    digits = load_dataset("digits")
    none = dict(x_test=digits.x_test[:0], y_test=digits.y_test[:0])
    bare = dataclasses.replace(digits, **none)
    monkeypatch.setattr(job, "load_named", lambda data, folder: bare)
    held = dataclasses.replace(TINY, data=DataConfig("digits", validation=0.2))
    found = Bench(None).run(held, "tuning")
    assert found["status"] == "done", found
    assert found["num_examples"] == 1150 and found["num_evaluated"] == 287
    assert Bench(None).run(TINY, "final")["status"] == "failed"


def test_a_run_of_a_sweep_is_the_run_of_train(tmp_path):
    """Same plan, batches, noise and steps, learning rate and all."""
    rate = dataclasses.replace(TINY.optimizer, learning_rate=0.05)
    faster = dataclasses.replace(TINY, optimizer=rate)
    bench = Bench(None)
    found = [bench.run(config, "digits") for config in (TINY, faster)]
    assert found[0]["params_sha256"] != found[1]["params_sha256"]
    summary = run_training(faster, tmp_path / "run")  # the second one, compiled before
    assert found[1]["accuracy"] == summary["test_accuracy"]
    assert found[1]["epsilon_spent"] == summary["epsilon"]
    assert found[1]["params_sha256"] == summary["params_sha256"]


def test_an_epsilon_out_of_reach_is_impossible_not_failed():
    strict = dataclasses.replace(TINY.privacy, epsilon=1e-7, delta=1e-12)
    found = Bench(None).run(dataclasses.replace(TINY, privacy=strict), "strict")
    assert found["status"] == "impossible"
    assert found["error"].count(". ") == 0 and "epsilon" in found["error"]


def test_a_run_that_diverges_is_failed_and_not_chosen():
    fast = dataclasses.replace(TINY.optimizer, learning_rate=3e38)
    found = Bench(None).run(dataclasses.replace(TINY, optimizer=fast), "fast")
    assert found["status"] == "failed"
    assert found["error"].startswith("The run diverged") and "rate." in found["error"]


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_sweeps_can_be_and_report_five_seeds(path):
    sweep = read_sweep(path)
    assert len(sweep.seeds) >= 5
    assert (
        sweep.reference.startswith(("dp_adam", "dp_sgd"))
        or "uniform" in sweep.reference
    )
    tuned = [len(tuning_runs(sweep, cell)) for cell in cells(sweep)]
    assert len(set(tuned)) == 1 and tuned[0] >= 6


def test_new_fields_keep_old_records_and_new_defaults_do_not():
    record = json.loads(json.dumps(dataclasses.asdict(TINY)))
    del record["optimizer"]["b1"]
    key = config_key(dataclasses.asdict(TINY))
    assert config_key(record) == key
    record["optimizer"]["b2"] = 0.9  # was the default when the record was written
    assert config_key(record) != key
    assert config_key(dataclasses.asdict(Config())) != key
    assert jax.tree.leaves(record)
