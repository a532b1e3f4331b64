"""A module with BatchNorm, mended: each example's gradient is its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dp_ilg
from dp_ilg.training.frameworks.mending import groups_of, mended


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_scale=width != 6, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x)))


class Net(nnx.Module):
    """Names and depths that nobody tuned for."""

    def __init__(self, rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(1, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.relu
        )
        self.blocks = nnx.List([Block(6, rngs), Block(6, rngs)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@pytest.fixture
def net():
    return Net(nnx.Rngs(0))


def norms(model):
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]


def test_every_batch_norm_is_replaced_and_the_diff_says_where(net):
    found = mended(net)
    assert not norms(found.module) and len(norms(net)) == 3
    assert "- nnx.BatchNorm(6)\n+ nnx.GroupNorm(6, num_groups=6)" in found.diff
    places = {change.path for change in found.changes}
    assert places == {
        "model.stem.layers[1]",
        "model.blocks[0].norm",
        "model.blocks[1].norm",
    }


def test_scale_and_bias_are_kept_and_the_original_is_left(net):
    norm = net.stem.layers[1]
    norm.scale[...] = jnp.arange(6.0)
    norm.bias[...] = -jnp.arange(6.0)
    found = mended(net).module
    np.testing.assert_array_equal(found.stem.layers[1].scale[...], np.arange(6.0))
    found.stem.layers[1].scale[...] = jnp.zeros(6)
    np.testing.assert_array_equal(norm.scale[...], np.arange(6.0))
    assert found.blocks[0].norm.scale is None
    assert found.blocks[0].norm.bias[...].shape == (6,)


def test_no_example_sees_another(net):
    x = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    found = mended(net).module
    whole = found(x)
    alone = jnp.concatenate([found(x[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    assert np.abs(net(x) - jnp.concatenate([net(x[i : i + 1]) for i in range(5)])).max()


def test_a_private_run_takes_it_and_refused_the_original(net, tmp_path):
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=40, batch_size=10, num_steps=2
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(40, 8, 8, 1)).astype(np.float32), rng.integers(0, 3, 40)

    def loss(model, example):
        x, y = example
        logits = model(x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    train = dp_ilg.private_training(loss, optax.sgd(0.1), plan, seed=0)
    with pytest.raises(ValueError, match="BatchNorm"):
        train.init(net)
    train = dp_ilg.private_training(loss, optax.sgd(0.1), plan, seed=0)
    state = train.init(mended(net).module)
    for lot in train.batches(data, ledger=tmp_path / "ledger.jsonl"):
        state = train.step(state, lot)
    assert train.epsilon(state) == plan.epsilon()


def test_a_norm_alone_and_a_module_without_any():
    alone = mended(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), most_groups=4)
    assert isinstance(alone.module, nnx.GroupNorm) and alone.module.num_groups == 4
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert mended(linear).module is linear and mended(linear).diff == ""


def test_linen_is_told_what_to_write():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(12)(x)
            x = nn.BatchNorm(use_running_average=False, name="norm")(x)
            return nn.Dense(1)(x)

    found = mended(Plain(), jnp.zeros((4, 3)))
    assert found.module is None
    assert found.diff == (
        "@ norm\n- nn.BatchNorm(...)(x)\n+ nn.GroupNorm(num_groups=12)(x)"
    )
    clean = nn.Dense(2)
    assert mended(clean, jnp.zeros((1, 3))).module is clean


@pytest.mark.parametrize(
    "act, error, words",
    [
        (lambda: mended({"w": 1}), TypeError, "module is dict"),
        (lambda: mended(nn.Dense(2)), TypeError, "pass an input"),
        (
            lambda: mended(nnx.Sequential(nnx.BatchNorm(3, axis=1, rngs=nnx.Rngs(0)))),
            ValueError,
            "normalises axis 1",
        ),
        (lambda: mended(nn.Dense(2), most_groups=0), ValueError, "most_groups is 0"),
    ],
)
def test_what_cannot_be_mended_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act()


def test_groups_divide_the_channels():
    for channels in (1, 6, 31, 64, 97, 320):
        assert channels % groups_of(channels) == 0 and groups_of(channels) <= 32
