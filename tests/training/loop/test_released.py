"""Metrics through the front door: with aux, beside keys, saved with the state."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from tests.training.loop.scene import (
    data,
    loss_fn,
    made_plan,
    noisy_loss,
    trained,
    training,
)
from tests.training.loop.scene import start as start_params

METRICS = {
    "loss": dp_ilg.Metric(lambda loss, aux: loss, high=2.0),
    "right": dp_ilg.Metric(lambda loss, right: right),
}


def with_aux(params, example):
    """The loss, and whether the guess is right."""
    x, y = example
    return loss_fn(params, example), (params["w"] @ x + params["b"] > 0) == (y == 1)


def noisy_with_aux(params, example, key):
    return noisy_loss(params, example, key), with_aux(params, example)[1]


@pytest.mark.parametrize("loss", [with_aux, noisy_with_aux])
def test_metrics_are_released_and_near_the_truth(loss):
    """Without noise what is left is the chance of the draw."""
    plan = made_plan(1, noise_multiplier=0.0, metric_budget=0.1)
    train = training(loss, plan=plan, has_aux=True, metrics=METRICS)
    state = trained(train)
    found = train.metrics(state)
    x, y = data()
    guess = with_aux(start_params(), (x[0], y[0]))[1]
    true = np.mean((np.zeros(len(y)) > 0) == (y == 1))
    assert isinstance(bool(guess), bool)
    assert abs(found["right"].value - true) < 5 * found["right"].stderr
    assert 0 < found["loss"].stderr and train.statement(state)


def test_a_budget_and_its_metrics_belong_together():
    with pytest.raises(ValueError, match="metric_budget is 0.1, but the chain"):
        training(plan=made_plan(metric_budget=0.1)).init(start_params())
    with pytest.raises(ValueError, match="metric_budget is 0; make the plan"):
        training(metrics=METRICS).init(start_params())


def test_without_metrics_there_are_none():
    train = training()
    assert train.metrics(trained(train, until=1)) == {}


def test_any_optimizer_stands_behind_them():
    plan = made_plan(2, metric_budget=0.1)
    train = training(
        with_aux, optax.sgd(0.1, momentum=0.9), plan, has_aux=True, metrics=METRICS
    )
    found = train.metrics(trained(train))
    assert all(bool(jnp.isfinite(x)) for one in found.values() for x in one)
