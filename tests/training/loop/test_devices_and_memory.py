"""Meshes, exact noise, memory budgets and other data, through the front door."""

import jax
import numpy as np
import optax
import pytest

from dp_ilg.training.loop.rows import Rows
from dp_ilg.training.mesh import make_mesh
from tests.training.loop import scene
from tests.training.loop.test_front import by_hand


def test_on_a_mesh_it_has_the_bits_of_one_device():
    train = scene.training(optimizer=optax.sgd(0.5), mesh=make_mesh(1, 1))
    state = scene.trained(train)
    params = by_hand(train, optax.sgd(0.5))
    assert scene.bits(state.params) == scene.bits(params)


def test_exact_noise_is_drawn_ahead_and_repeated_bit_for_bit(tmp_path):
    plan = scene.made_plan(exact_noise=True)
    whole = scene.trained(scene.training(plan=plan))
    train = scene.training(plan=plan)
    state = scene.trained(train, ledger=tmp_path / "l.jsonl", until=2)
    train.save(tmp_path / "saved", state)
    other = scene.training(plan=plan, seed=None)
    other.init(scene.start())
    state = other.restore(tmp_path / "saved")
    lots = other.batches(scene.data(), ledger=tmp_path / "l.jsonl", resume=True)
    for lot in list(lots):  # asked for ahead: the thread that draws is gone by then
        state = other.step(state, lot)
    assert scene.bits(state.params) == scene.bits(whole.params)
    with pytest.raises(ValueError, match="drawn for one device"):
        scene.training(plan=plan, mesh=make_mesh(1, 1))


def test_a_memory_budget_picks_the_micro_batch():
    wide = lambda p, e: scene.loss_fn(p, e)  # noqa: E731
    train = scene.training(loss=wide, memory_mib=1.0)
    scene.trained(train, until=1)
    picked = train._binding.program.grad_fn.microbatch_size
    assert 1 <= picked <= train._binding.sampler.chunk_size
    with pytest.raises(ValueError, match="is exceeded by a micro-batch of 1"):
        scene.trained(scene.training(loss=wide, memory_mib=1e-6))


class Spread:
    """A source of another library: rows by position."""

    fingerprint = "spread-1"

    def __init__(self):
        self.data = scene.data()

    def __len__(self):
        return scene.N

    def rows(self, indices):
        return tuple(a[np.maximum(indices, 0)] for a in self.data)


def examples():
    x, y = scene.data()
    return [(x[i], y[i]) for i in range(scene.N)]


KINDS = {
    "arrays": scene.data,
    "jax arrays": lambda: jax.tree.map(jax.numpy.asarray, scene.data()),
    "a list of examples": examples,
    "a source": Spread,
}


@pytest.mark.parametrize("name", list(KINDS)[1:])
def test_any_kind_of_data_trains_the_same(name):
    train = scene.training(optimizer=optax.sgd(0.5))
    state = scene.trained(train, KINDS[name]())
    params = by_hand(train, optax.sgd(0.5))
    assert scene.bits(state.params) == scene.bits(params)


def test_the_digest_names_the_data_and_their_order():
    x, y = scene.data()
    digest = lambda data: Rows(data).digest()  # noqa: E731
    assert digest((x, y)) == digest((x.copy(), y.copy()))
    last = x.copy()
    last[-1, -1] += 1
    others = [(y, x), (x[::-1], y), (last, y), {"x": x, "y": y}, (x.astype("f8"), y), x]
    found = [digest(data) for data in [(x, y), *others, Spread(), examples()]]
    assert len(set(found)) == len(found)
    assert digest({"x": x, "y": y}) != digest({"a": x, "y": y})
