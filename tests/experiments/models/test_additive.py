"""The model that adds one table a column, and models that answer with a number."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.config.metrics import MetricsConfig
from dp_ilg.experiments.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    config_from_mapping,
)
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.reports.page import render_report
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs import runner
from dp_ilg.experiments.runs.evaluation import answer_fn
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.measures import run_metrics

X = (jnp.array([2, 4]), jnp.array([0.5, -1.0]))
NUMBER = Facts(X, 1, num_categories=(3, 5), target_range=(1.0, 5.0))
THREE = Facts(X, 3, num_categories=(3, 5))
SIZES: dict[str, Any] = dict(
    scales=(1.0, 2.0, 0.5, 0.1), slopes=(0.4, 0.0), embed_dim=2
)


def leaves(params):
    """Parameters by the last words of their path, whichever Flax they are of."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        keys = [k for k in keys if k not in ("value", "embedding", "kernel")]
        found["/".join(keys)] = leaf
    return found


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("facts", [NUMBER, THREE], ids=["number", "classes"])
def test_the_sum_is_what_it_says(framework, facts):
    model = build_model("additive", facts, framework=framework, **SIZES)
    params = model.init(jax.random.key(0))
    draw = lambda p: jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731
    drawn = jax.tree.map(draw, params)
    p, outputs = leaves(drawn), facts.num_classes
    user, film, z = 2, 4, np.asarray(X[1])
    want = 0.1 * p["bias"] + 0.5 * z @ p["numbers"]
    want = want + p["column_0"][user] + 2 * p["column_1"][film]
    want = want + 0.4 * p["slopes_0"][user].reshape(outputs, 2) @ z
    factors = [p["factors_0"][user], p["factors_1"][film]]
    want = want + np.sum(np.multiply(*factors).reshape(outputs, 2), axis=1)
    if outputs == 1:
        example = (X, jnp.float32(4.0))
        loss = model.loss_fn(drawn, example)
        np.testing.assert_allclose(loss, (3 + want[0] - 4) ** 2, rtol=1e-5)
        said = model.predict(drawn, jax.tree.map(lambda a: a[None], X))
        np.testing.assert_allclose(said, np.clip(3 + want, 1, 5), rtol=1e-5)
    else:
        loss = model.loss_fn(drawn, (X, jnp.int32(1)))
        np.testing.assert_allclose(loss, -jax.nn.log_softmax(want)[1], rtol=1e-5)


def test_without_products_it_is_linear_and_begins_at_the_middle():
    model = build_model("additive", NUMBER, scales=(1.0, 1.0, 1.0, 1.0))
    params = model.init(jax.random.key(0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))
    assert model.loss_fn(params, (X, jnp.float32(5.0))) == 4.0
    gradient = jax.grad(model.loss_fn)(params, (X, jnp.float32(5.0)))
    norms = jax.tree.leaves(jax.tree.map(jnp.linalg.norm, gradient))
    squares = sum(float(n) ** 2 for n in norms)
    assert squares == pytest.approx(16 * (1 + 1 + 1 + 1.25), rel=1e-6)


def test_the_engine_gives_the_clipped_sum_of_single_examples():
    model = build_model("additive", NUMBER, **SIZES)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, (3, 5), (40, 2)).astype(np.int32)
    batch = (ids, rng.normal(size=(40, 2)).astype(np.float32))
    batch = jax.tree.map(jnp.asarray, (batch, rng.uniform(1, 5, 40).astype(np.float32)))
    fast = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=0.7, engine="bookkeeping")
    slow = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=0.7, engine="vmap")
    uniform = dp_ilg.Geometry.uniform(params)
    one, other = (f(params, batch, geometry=uniform).gradients for f in (fast, slow))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(scales=(1.0,)), "model.scales takes 4 numbers"),
        (dict(slopes=(1.0,)), "model.slopes takes 2"),
    ],
)
def test_wrong_sizes_end_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        build_model("additive", NUMBER, **options)
    with pytest.raises(ValueError, match="takes categorical columns"):
        build_model("additive", Facts(jnp.zeros(3), 2), **options)


def test_a_model_of_several_scores_cannot_answer_with_a_number():
    facts = dataclasses.replace(NUMBER, num_classes=3)
    model = build_model("additive", facts)
    with pytest.raises(ValueError, match="one output"):
        model.loss_fn(model.init(jax.random.key(0)), (X, jnp.float32(2.0)))


def test_scales_are_positive():
    with pytest.raises(ValueError, match="model.scales is 0"):
        ModelConfig("additive", scales=(0.0,))
    with pytest.raises(ValueError, match="model.slopes is -1"):
        ModelConfig("additive", slopes=(-1.0,))


# --- a run whose examples ask for a number ----------------------------------------


def ratings(count: int = 400) -> Dataset:
    """Made-up ratings that follow who rated."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, (3, 5), (count, 2)).astype(np.int32)
    y = np.clip(2.0 + ids[:, 0] + rng.normal(size=count) / 4, 1, 5).astype(np.float32)
    none = np.zeros((count, 0), np.float32)
    half = count // 2
    return Dataset(
        "made up",
        (ids[:half], none[:half]),
        y[:half],
        (ids[half:], none[half:]),
        y[half:],
        num_classes=1,
        note="Made up.",
        num_categories=(3, 5),
        target_range=(1.0, 5.0),
    )


def config_of(**changes) -> Config:
    privacy = PrivacyConfig(epsilon=8.0, batch_size=100, num_steps=12)
    privacy = dataclasses.replace(privacy, accountant="rdp", l2_clip_norm=2.0)
    chosen = OptimizerConfig(
        method="dp_sgd_ilg", learning_rate=0.1, momentum=0.5, importance="uniform"
    )
    config = Config(model=ModelConfig("additive"), privacy=privacy, optimizer=chosen)
    run = dataclasses.replace(config.run, seed=0, eval_every=3)
    return dataclasses.replace(config, run=run, **changes)


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(
        "dp_ilg.experiments.runs.job.load_named", lambda chosen, folder: ratings()
    )


def test_a_run_says_its_error_everywhere(made_up, tmp_path):
    config = config_of(metrics=MetricsConfig(release=True, budget=0.05))
    summary = runner.run_training(config, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    first, last = lines[0]["test_mse"], lines[-1]["test_mse"]
    assert last == summary["test_mse"] < first < 2.0
    assert summary["test_rmse"] == pytest.approx(last**0.5)
    assert "test_accuracy" not in summary and "test_accuracy" not in lines[0]
    assert set(summary["released"]) == {"train_mse"}
    assert summary["iterates"]["mean"] == pytest.approx(
        np.mean([line["test_mse"] for line in lines if 2 * line["step"] >= 12])
    )
    record = read_run(tmp_path / "run")
    assert record.history is not None and record.history.title() == "Test MSE"
    page = render_report(record)
    assert f"{last:.4f}" in page and "Test MSE" in page and "Test accuracy" not in page


def test_the_error_is_that_of_clipped_answers(made_up):
    job = build_job(config_of())
    params = job.model.init(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 9.0, params)
    want = np.mean((5.0 - job.data.y_test) ** 2)
    assert answer_fn(job)(params) == pytest.approx(want, rel=1e-6)


def test_the_metric_of_an_error_is_bounded_by_the_range():
    metric = run_metrics(MetricsConfig(release=True), ratings())["train_mse"]
    assert metric.high == 16.0
    model = build_model("additive", NUMBER)
    params = jax.tree.map(lambda p: p + 9.0, model.init(jax.random.key(0)))
    assert model.loss_and_right is not None
    loss, error = model.loss_and_right(params, (X, jnp.float32(1.0)))
    assert loss > 16.0 and error == 16.0  # the answer would be 5


def test_a_config_with_scales_round_trips():
    mapping = dict(
        data=dict(name="movielens"),
        model=dict(name="additive", scales=[1.0, 1.0, 0.3, 0.1], slopes=[0.4, 0.0]),
        privacy=dict(epsilon=1.0, delta=1e-6, batch_size=10, num_steps=2),
        optimizer=dict(learning_rate=1.0),
    )
    config = config_from_mapping(mapping)
    assert config.model.options()["slopes"] == (0.4, 0.0)
