"""A run that releases its training loss and accuracy: folder, report, bar, audit."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from rich.progress import Progress

import dp_ilg
from dp_ilg.experiments.audits.report import CHECKS, gather
from dp_ilg.experiments.audits.subject import audited_trainer
from dp_ilg.experiments.config.metrics import MetricsConfig
from dp_ilg.experiments.config.schema import config_to_toml, read_config
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.measures import run_metrics, told
from dp_ilg.experiments.runs.progress import Bar
from dp_ilg.experiments.runs.runner import run_training
from tests.experiments.runs.test_trainer import tiny

NAMES = ["train_accuracy", "train_loss"]


def measured(budget=0.2, **changes):
    release = MetricsConfig(release=True, budget=budget, smooth_steps=5)
    return dataclasses.replace(tiny(**changes), metrics=release)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "run"
    return path, run_training(measured(), path)


def test_the_folder_holds_what_was_released(run):
    path, summary = run
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line["released"]) for line in lines] == [NAMES, NAMES]
    for line in lines:
        for found in line["released"].values():
            assert all(np.isfinite(x) for x in found.values())
            assert 0 < found["smoothed_stderr"] < found["stderr"]
    assert summary["released"] == lines[-1]["released"]
    assert summary["metric_budget"] == 0.2
    assert summary["released_in_words"].startswith("train accuracy 0.")
    assert not summary["unprotected_train_loss_shown"]
    assert "unprotected" not in (path / "metrics.jsonl").read_text()


def test_the_plan_pays_and_the_statement_says_so(run):
    path, summary = run
    plan = dp_ilg.PrivacyPlan.from_json((path / "plan.json").read_text())
    assert plan.metric_budget == 0.2
    assert "20 % for noisy metrics of the training examples" in summary["statement"]
    assert summary["epsilon"] <= 8.0
    bare = dataclasses.replace(plan, metric_budget=0.0)
    assert bare.epsilon() == plan.epsilon() and bare.digest() != plan.digest()
    ratio = plan.gradient_noise_multipliers / bare.gradient_noise_multipliers
    assert ratio == pytest.approx(np.sqrt(0.99 / 0.79))


def test_it_is_near_the_truth(run):
    """The running average beside the test accuracy, which 20 steps hardly part."""
    _, summary = run
    accuracy = summary["released"]["train_accuracy"]
    gap = abs(accuracy["smoothed"] - summary["test_accuracy"])
    assert gap < 0.1 + 4 * accuracy["smoothed_stderr"]


def test_the_report_shows_the_curve_and_the_split(run):
    path, _ = run
    page = (path / "report.html").read_text()
    assert "Metrics of the training examples" in page and "released-" in page
    assert "metrics 20" in page
    history = read_run(path).history
    assert history is not None and list(history.released) == NAMES
    assert history.released["train_loss"].shape == (2, 4)


def test_the_bar_shows_the_running_average():
    bar = Bar(Progress(disable=True), batch_size=9, num_steps=9, step=0)
    found = {"train_loss": dp_ilg.Released(0.5, 0.625, 0.25, 0.125)}
    record = {"epsilon": 0.5, "test_accuracy": 0.25, "released": told(found)}
    bar.evaluated(record)
    assert bar.text.endswith("test accuracy 25.0 % · train loss 0.625 ± 0.125")


def test_without_the_flag_nothing_is_released_and_nothing_paid():
    config = tiny()
    job = build_job(config)
    assert job.plan.metric_budget == 0 and not job.grad_fn.metrics
    assert job.make_optimizer(jax.random.key(0)).metrics is None
    assert run_metrics(config.metrics, job.data) == {}


def test_the_section_survives_a_round_trip(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(measured(), seed=True))
    assert read_config(path) == measured()
    old = config_to_toml(tiny(), seed=True).partition("[metrics]")[0]
    path.write_text(old.replace("[run]", "[run]\nshow_private_loss = false"))
    assert read_config(path) == tiny()


def test_models_say_their_loss_the_same_way():
    """Of one class of two and of several."""
    facts = [
        (Facts(np.zeros(4, np.float32), num_classes=2), np.int32(1)),
        (Facts(np.zeros(4, np.float32), num_classes=3), np.int32(2)),
    ]
    for fact, y in facts:
        model = build_model("linear", fact)
        params = model.init(jax.random.key(1))
        x = np.arange(4, dtype=np.float32)
        pair: Any = model.loss_and_right
        loss, right = pair(params, (x, y))
        assert loss == model.loss_fn(params, (x, y))
        assert right == (model.predict(params, x[None])[0] == y)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["noise of the metrics", "noise against the charge"])
def test_an_audit_of_the_run_looks_at_its_metrics(check):
    finding = CHECKS[check](gather(audited_trainer(measured(), max_steps=3), 0))
    assert finding.holds and "no metric" not in finding.found


@pytest.mark.slow
@pytest.mark.parametrize("check", ["sensitivity", "clipped sum", "absent examples"])
def test_promises_of_a_measured_run_hold(check):
    finding = CHECKS[check](gather(audited_trainer(measured(), max_steps=2), 0))
    assert finding.holds, finding
