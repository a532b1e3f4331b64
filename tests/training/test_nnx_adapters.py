"""LoRA for NNX: adapters change nothing at first, and alone are trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dp_ilg
from dp_ilg.training.frameworks.adapt import adapt
from dp_ilg.training.nnx_adapters import lora_variables, merge_lora, with_lora

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs) for _ in range(1)])
        self.norm, self.head = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(jnp.tanh(self.blocks[0](x))))


@pytest.fixture(scope="module")
def base():
    return Net(nnx.Rngs(0))


def moved(params):
    return jax.tree.map(lambda p: p + 0.1, params)


def test_adapters_change_nothing_and_are_merged_into_the_same_network(base):
    made = with_lora(base, rngs=nnx.Rngs(1), rank=2)
    np.testing.assert_allclose(made(X), base(X), rtol=1e-6)
    nnx.update(made, moved(nnx.to_pure_dict(nnx.state(made, lora_variables()))))
    assert np.abs(made(X) - base(X)).max() > 1e-3
    merged = merge_lora(made)
    np.testing.assert_allclose(merged(X), made(X), rtol=1e-4, atol=1e-5)
    same = jax.tree.structure(nnx.to_pure_dict(nnx.state(base)))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(merged))) == same
    again = with_lora(with_lora(base, rngs=nnx.Rngs(1), where="head"), rngs=nnx.Rngs(2))
    np.testing.assert_allclose(again(X), base(X), rtol=1e-6)


def test_a_new_head_is_trained_with_them(base):
    made = with_lora(base, rngs=nnx.Rngs(1), rank=2, where="blocks/*")
    loss = lambda net, x: net(x)[0] ** 2  # noqa: E731
    own = adapt(made, loss, wrt=lora_variables()).params
    assert {name for name in own} == {"blocks"}
    own = adapt(made, loss, wrt=lora_variables("head")).params
    assert {name for name in own} == {"blocks", "head"}
    assert sorted(own["head"]) == ["bias", "kernel"]


def test_only_what_is_trained_moves(base, tmp_path):
    made = with_lora(base, rngs=nnx.Rngs(1), rank=2, where="blocks/*")
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=8, batch_size=4, num_steps=2
    )
    loss = lambda net, x: net(x)[0] ** 2  # noqa: E731
    optimizer = nnx.Optimizer(made, optax.sgd(0.1), wrt=lora_variables("head"))
    facts: dict[str, Any] = dict(seed=1, importance="uniform", source="public")
    train = dp_ilg.private_training(loss, optimizer, plan, **facts)
    state = train.init((made, optimizer))
    for lot in train.batches(X, ledger=None):
        state = train.step(state, lot)
    trained, _ = state.model
    before, after = (nnx.to_flat_state(nnx.state(net)) for net in (made, trained))
    for (path, one), (_, other) in zip(before, after, strict=True):
        is_trained = "head" in path or isinstance(one, nnx.LoRAParam)
        assert bool(jnp.any(one[...] != other[...])) == is_trained, path
    assert isinstance(merge_lora(trained), Net)


def test_what_has_no_adapters_is_refused(base):
    with pytest.raises(ValueError, match=r"the module's are blocks/0, head"):
        with_lora(base, rngs=nnx.Rngs(0), where="tail")
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(base)
    with pytest.raises(ValueError, match="rank is 0"):
        with_lora(base, rngs=nnx.Rngs(0), rank=0)
