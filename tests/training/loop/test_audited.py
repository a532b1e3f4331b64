"""The front door's own step passes the audit of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from tests.training.loop.scene import loss_fn, made_plan, noisy_loss, start, training

EXAMPLE = np.full(3, 2.0, np.float32), np.int32(0)


@pytest.mark.parametrize("loss", [loss_fn, noisy_loss])
def test_a_private_training_passes(loss):
    train = training(loss, optax.sgd(0.1), importance="uniform", source="public")
    weights = jax.tree.map(lambda p: p + 1.0, start())
    found = dp_ilg.auditing.audit_step(train, weights, EXAMPLE, train.plan, trials=128)
    assert found.verdict == "not refuted", str(found)


def test_a_plan_with_more_noise_than_there_is_is_refuted():
    train = training(loss_fn, optax.sgd(0.1), importance="uniform", source="public")
    weights = jax.tree.map(lambda p: p + 1.0, start())
    louder = made_plan(noise_multiplier=1.5)
    found = dp_ilg.auditing.audit_step(train, weights, EXAMPLE, louder, trials=256)
    assert "one example" in found.failed, str(found)


def test_the_run_itself_is_left_alone():
    train = training()
    train.auditable({"w": jnp.zeros(3), "b": jnp.zeros(())})
    with pytest.raises(ValueError, match="batches comes after init"):
        train.batches(None, ledger=None)


def test_exact_noise_is_refused():
    train = training(noise="exact", source="public")
    with pytest.raises(ValueError, match="drawn on the host, which audit_step"):
        dp_ilg.auditing.audit_step(train, start(), EXAMPLE, train.plan)
