"""The front door: the bits of its parts by hand, and lots that are charged first."""

import dataclasses
import json
import logging
import stat

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.optimizers.behind_noise import behind_noise
from dp_ilg.training.loop import core
from dp_ilg.training.loop.binding import _check_processes, bound_keys
from dp_ilg.training.memory_limits import OutOfMemory
from dp_ilg.training.step import make_train_step
from tests.training.loop import scene


def by_hand(train, optimizer, loss=scene.loss_fn, make=lambda t, rows, i: rows):
    """The same run from the parts: chain, clipped gradient, sampler and step."""
    plan, binding, rows = train.plan, train._binding, scene.data()
    tx = behind_noise(optimizer, plan, key=train._noise_key())
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
    step = make_train_step(grad_fn, tx)
    params = scene.start()
    state = bound_keys(tx.init(params), binding.noise_words)
    for t in range(plan.num_steps):
        lot = [
            (make(t, tuple(a[i] for a in rows), i), mask)
            for i, mask in binding.sampler.chunks(t)
        ]
        params, state = step(params, state, lot)
    return params


def test_it_has_the_bits_of_its_parts_by_hand():
    train = scene.training()
    state = scene.trained(train)
    params = by_hand(train, optax.adam(0.1))
    assert scene.bits(state.params) == scene.bits(params)
    assert int(state.step) == train.plan.num_steps
    assert train.epsilon(state) == train.plan.epsilon()
    assert state.model is state.params


@pytest.mark.parametrize("chunk_size", [5, 7])
def test_a_draw_of_several_chunks_is_one_step(chunk_size):
    whole = scene.trained(scene.training(optimizer=optax.sgd(0.5)))
    train = scene.training(optimizer=optax.sgd(0.5), chunk_size=chunk_size)
    scene.trained(train)
    sizes = [len(train._binding.sampler.chunks(t)) for t in range(4)]
    assert max(sizes) > 1
    params = by_hand(train, optax.sgd(0.5))
    assert scene.bits(train._at.state.params) == scene.bits(params)
    # another program draws other noise: the two runs could not be told apart otherwise
    assert scene.bits(train._at.state.params) != scene.bits(whole.params)


def test_lots_are_on_disk_before_they_are_handed_out(tmp_path):
    train, path = scene.training(), tmp_path / "run" / "ledger.jsonl"
    state = train.init(scene.start())
    seen = []
    for lot in train.batches(scene.data(), ledger=path):
        lines = [json.loads(x) for x in path.read_text().splitlines()]
        assert lines[-1]["step"] == lot.step
        seen.append(lines[-1]["released_from"])
        state = train.step(state, lot)
    assert len(set(seen)) == train.plan.num_steps
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = dp_ilg.PrivacyLedger(path, train.plan, resume=True)  # it is let go of
    assert again.steps == train.plan.num_steps
    again.close()


def test_a_lot_asked_for_too_early_is_kept_until_its_step():
    """Lots may be asked for ahead, as loaders that prefetch do."""
    train = scene.training(chunk_size=5)
    state = train.init(scene.start())
    lots = list(train.batches(scene.data(), ledger=None))
    assert train.epsilon(state) == train.plan.epsilon()  # all were handed out
    for lot in lots:
        state = train.step(state, lot)
    other = scene.trained(scene.training(chunk_size=5))
    assert scene.bits(state.params) == scene.bits(other.params)


def test_the_step_is_one_compiled_call_without_a_word_from_the_device():
    train = scene.training()
    state = train.init(scene.start())
    lots = iter(train.batches(scene.data(), ledger=None))
    state = train.step(state, next(lots))
    lot = next(lots)
    with jax.transfer_guard_device_to_host("disallow"):
        state = train.step(state, lot)
    assert train._binding.program.step.whole._cache_size() == 1


def test_a_state_is_given_away_and_the_model_is_not():
    train, params = scene.training(), scene.start()
    state = train.init(params)
    (first, *_) = list(train.batches(scene.data(), ledger=None))
    after = train.step(state, first)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    assert "hidden" in repr(after) and "hidden" in repr(train)


SETTINGS = {
    "seed": dict(seed=1),
    "rate": dict(optimizer=optax.adam(0.2)),
    "loss": dict(loss=lambda p, e: 2 * scene.loss_fn(p, e)),
    "clip mode": dict(clip_mode="normalize"),
    "plan": dict(plan=scene.made_plan(5)),
}


@pytest.mark.parametrize("name", [*SETTINGS, "data"])
def test_other_settings_draw_other_batches_and_other_noise(name):
    """Two runs of one seed that could release other sums share no noise."""
    rows = scene.data()
    if name == "data":
        rows = rows[0].copy(), rows[1]
        rows[0][0, 0] += 1
    before = scene.bound(scene.training())
    after = scene.bound(scene.training(**SETTINGS.get(name, {})), rows)
    assert before.sampler._secret != after.sampler._secret
    assert before.noise_words.tolist() != after.noise_words.tolist()
    again = scene.bound(scene.training())
    assert again.digest == before.digest
    assert again.noise_words.tolist() == before.noise_words.tolist()


def test_no_seed_is_the_operating_systems_entropy_and_a_fixed_one_is_for_tests(caplog):
    keys = [scene.training(seed=None)._secret.hex() for _ in range(2)]
    assert keys[0] != keys[1] and all(len(key) == 64 for key in keys)
    core._say_that_it_is_for_tests.cache_clear()
    with caplog.at_level(logging.WARNING, "dp_ilg"):
        scene.training(seed=None)
        assert not caplog.records
        scene.training(seed=3)
        scene.training(seed=4)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "for tests" in caplog.text and "operating system" in repr(
        scene.training(seed=None)
    )


def test_metrics_are_released_and_raw_ones_are_not():
    """The loss may return aux; it feeds the metrics and goes nowhere else."""
    plan = scene.made_plan(metric_budget=0.2)
    metrics = {
        "loss": dp_ilg.Metric(lambda loss, aux: loss, high=2.0),
        "right": dp_ilg.Metric(lambda loss, aux: aux["right"]),
    }

    def loss_fn(params, example):
        x, y = example
        right = (params["w"] @ x + params["b"] > 0) == (y > 0)
        return scene.loss_fn(params, example), {"right": right.astype(jnp.float32)}

    train = scene.training(loss_fn, plan=plan, has_aux=True, metrics=metrics)
    state = scene.trained(train)
    found = train.metrics(state)
    assert sorted(found) == ["loss", "right"]
    assert all(np.isfinite(float(one.smoothed)) for one in found.values())
    plain = scene.training()
    assert plain.metrics(plain.init(scene.start())) == {}
    with pytest.raises(ValueError, match="metric"):
        scene.training(metrics=metrics).init(scene.start())


def test_running_out_of_memory_says_what_to_ask_for():
    train = scene.training(microbatch_size=8)
    state = train.init(scene.start())
    (lot, *_) = list(train.batches(scene.data(), ledger=None))

    def full(*_):
        raise MemoryError

    program = train._binding.program
    step = dataclasses.replace(program.step, whole=full)
    train._binding = train._binding._replace(program=program._replace(step=step))
    with pytest.raises(OutOfMemory, match="microbatch_size=4"):
        train.step(state, lot)


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="runs in one process, but there are 2"):
        _check_processes(2)
