"""The reproduction of Abadi et al. 2016: its plan, its runs and what it refuses."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.papers import abadi as module
from dp_ilg.experiments.papers.abadi import PARTS, SETTINGS, abadi
from dp_ilg.experiments.papers.pca_network import (
    Images,
    Setting,
    initial,
    logits,
    plan_for,
    run,
)
from dp_ilg.experiments.papers.reproduce import REPRODUCTIONS, ReproduceOptions

SMALL = Setting(8.0, 97.0, epochs=20, learning_rate=2.0, dims=5, hidden=8)


@pytest.fixture(scope="module")
def images():
    """Ten separable classes of 12 pixels."""
    rng = np.random.default_rng(0)
    y = np.arange(1200, dtype=np.int32) % 10
    x = rng.uniform(size=(10, 12))[y] + 0.05 * rng.normal(size=(1200, 12))
    return Images(x[:900], y[:900], x[900:], y[900:])


@pytest.mark.parametrize("setting", SETTINGS, ids=PARTS)
def test_plans_spend_their_epsilon_on_pca_and_training_together(setting):
    plan = plan_for(setting, 60_000)
    assert plan.batch_size == 600 and plan.delta == 1e-5
    assert plan.num_steps == 100 * setting.epochs
    assert 0.995 * setting.epsilon < plan.epsilon() <= setting.epsilon
    assert 0 < plan.epsilon(0) < 0.7 * setting.epsilon
    alone = dataclasses.replace(plan, prior_releases=())
    assert alone.epsilon() < plan.epsilon()


def test_rows_are_the_papers():
    found = [(s.epsilon, s.reported, s.dims, s.hidden) for s in SETTINGS]
    assert found == [(0.5, 90, 60, 1000), (2, 95, 60, 1000), (8, 97, 60, 1000)]
    assert REPRODUCTIONS["abadi"].parts == PARTS
    params = initial(jax.random.key(0), 60, 1000)
    assert logits(params, np.zeros((3, 60))).shape == (3, 10)


def test_a_run_learns_and_repeats_itself(images):
    found = run(SMALL, images, 0)
    assert found["test_accuracy"] > 0.5  # one in ten by chance
    assert found["epsilon"] <= 8.0 and found["steps"] == 30
    again = run(SMALL, images, 0)
    assert again["test_accuracy"] == found["test_accuracy"]
    assert json.loads(json.dumps(found)) == found


def test_more_directions_than_pixels_are_refused(images):
    with pytest.raises(ValueError, match="num_components is 13, but the data has 12"):
        run(dataclasses.replace(SMALL, dims=13), images, 0)


def test_a_budget_too_small_for_one_step_is_refused(images):
    with pytest.raises(ValueError, match="DP-PCA alone costs .* too small for one"):
        run(dataclasses.replace(SMALL, epsilon=0.1), images, 0)


def test_a_run_ends_at_its_deadline(images):
    with pytest.raises(TimeoutError):
        run(SMALL, images, 0, time.monotonic() - 1)


def test_missing_data_say_where_to_get_it(tmp_path, monkeypatch):
    def no_net(*args, **kwargs):
        raise OSError("no network")

    sklearn = pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(sklearn, "fetch_openml", no_net)
    with pytest.raises(DataError, match="mnist"):
        abadi(ReproduceOptions(data_dir=tmp_path))


def test_runs_are_kept_and_not_repeated(images, tmp_path, monkeypatch):
    small = dataclasses.replace(SMALL, epochs=1)
    settings = tuple(dataclasses.replace(small, epsilon=e) for e in (2.0, 8.0))
    monkeypatch.setattr(module, "SETTINGS", settings)
    monkeypatch.setattr(module, "PARTS", ("2", "8"))
    monkeypatch.setattr(module, "_data", lambda options: images)
    options = ReproduceOptions(seeds=1, out=tmp_path / "runs.jsonl")
    table = abadi(dataclasses.replace(options, only=("8",)))
    assert [row["epsilon"] for row in table["rows"]] == [8.0]
    both = abadi(options)
    assert [row["epsilon"] for row in both["rows"]] == [2.0, 8.0]
    assert both["rows"][1] == table["rows"][0]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(module, "run", None)  # everything is there already
    assert abadi(options)["rows"] == both["rows"]
    none = abadi(dataclasses.replace(options, out=None, max_minutes=1e-9))
    assert none["rows"] == []
