"""Models: linen and NNX alike, padding not counted, mutable state refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dp_ilg.experiments.models.networks import (
    MODELS,
    build_model,
    linen_model,
    nnx_model,
)
from dp_ilg.experiments.models.sizes import SIZES, Facts

FRAMEWORKS = ("linen", "nnx")
FACTS = {
    "linear": Facts(jnp.zeros((8, 8)), num_classes=10),
    "mlp": Facts(jnp.zeros((8, 8)), num_classes=10),
    "cnn": Facts(jnp.zeros((28, 28)), num_classes=10),
    "group_norm_cnn": Facts(jnp.zeros((8, 8, 3)), num_classes=10),
    "embedding": Facts(jnp.zeros(6, jnp.int32), num_classes=2, num_tokens=30),
    "transformer": Facts(jnp.zeros(6, jnp.int32), num_classes=2, num_tokens=30),
    "language_model": Facts(jnp.zeros(6, jnp.int32), num_classes=30, num_tokens=30),
    "tabular": Facts(
        (jnp.zeros(2, jnp.int32), jnp.zeros(3)), num_classes=2, num_categories=(4, 5)
    ),
    "additive": Facts(
        (jnp.zeros(2, jnp.int32), jnp.zeros(3)), num_classes=2, num_categories=(4, 5)
    ),
}


def batch_of(facts, size=3):
    def draw(a):
        rng = np.random.default_rng(0)
        if a.dtype == jnp.int32:
            return rng.integers(1, 4, (size, *a.shape)).astype(np.int32)
        return rng.normal(size=(size, *a.shape)).astype(np.float32)

    return jax.tree.map(draw, facts.x)


def test_every_model_is_covered():
    assert set(FACTS) == set(MODELS) == set(SIZES)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_a_gradient_everywhere_and_predicts(name, framework):
    facts = FACTS[name]
    model = build_model(name, facts, framework=framework)
    params = jax.jit(model.init)(jax.random.key(0))
    xs = batch_of(facts)
    is_text = name == "language_model"
    example = jax.tree.map(lambda a: a[0], xs), jnp.ones(6 * is_text or (), jnp.int32)
    loss, grads = jax.jit(jax.value_and_grad(model.loss_fn))(params, example)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(np.abs(g).sum() > 0 for g in jax.tree.leaves(grads))
    classes = jax.jit(model.predict)(params, xs)
    assert classes.shape == ((3, 6) if is_text else (3,))
    assert classes.dtype == jnp.int32
    assert set(classes.ravel().tolist()) <= set(range(facts.num_classes))


@pytest.mark.parametrize("name", MODELS)
def test_both_frameworks_build_the_same_network(name):
    sizes = []
    for framework in FRAMEWORKS:
        model = build_model(name, FACTS[name], framework=framework)
        params = jax.eval_shape(model.init, jax.random.key(0))
        sizes.append(sorted(p.shape for p in jax.tree.leaves(params)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_same_key_gives_the_same_parameters_and_another_does_not(framework):
    model = build_model("mlp", FACTS["mlp"], framework=framework)
    one, same, other = (model.init(jax.random.key(k)) for k in (1, 1, 2))
    equal = lambda a, b: all(  # noqa: E731
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert equal(one, same)
    assert not equal(one, other)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_padding_does_not_count_in_the_mean(framework):
    short = Facts(jnp.zeros(3, jnp.int32), num_classes=2, num_tokens=30)
    long = Facts(jnp.zeros(9, jnp.int32), num_classes=2, num_tokens=30)
    model = build_model("embedding", short, framework=framework)
    padded = build_model("embedding", long, framework=framework)
    params = model.init(jax.random.key(0))
    ids = jnp.array([7, 8, 9])
    loss = model.loss_fn(params, (ids, jnp.int32(1)))
    longer = jnp.concatenate([ids, jnp.zeros(6, jnp.int32)])
    np.testing.assert_allclose(
        padded.loss_fn(params, (longer, jnp.int32(1))), loss, rtol=1e-6
    )
    other = longer.at[5].set(4)  # the control: a real token does count
    assert abs(padded.loss_fn(params, (other, jnp.int32(1))) - loss) > 1e-3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_text_of_padding_only_is_finite(framework):
    model = build_model("embedding", FACTS["embedding"], framework=framework)
    params = model.init(jax.random.key(0))
    empty = jnp.zeros(6, jnp.int32), jnp.int32(0)
    grads = jax.grad(model.loss_fn)(params, empty)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_two_classes_may_share_a_logit():
    model = linen_model(nn.Dense(1), jnp.zeros(2))
    params = {"kernel": jnp.array([[2.0], [0.0]]), "bias": jnp.zeros(1)}
    xs = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    assert model.predict(params, xs).tolist() == [1, 0]
    likely = model.loss_fn(params, (xs[0], jnp.int32(1)))
    np.testing.assert_allclose(likely, np.log1p(np.exp(-2.0)), rtol=1e-6)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


class NnxNorm(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class NnxDropout(NnxNorm):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.Dropout(0.5, rngs=rngs)


def test_batch_norm_is_refused_by_linen():
    model = linen_model(LinenNorm(), jnp.zeros(4))
    with pytest.raises(ValueError, match="collection batch_stats, through which"):
        model.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("module", "kind"), [(NnxNorm, "BatchStat"), (NnxDropout, "Rng")]
)
def test_other_state_is_refused_by_nnx(module, kind):
    with pytest.raises(ValueError, match=f"besides parameters .*{kind}"):
        nnx_model(module)


def test_a_model_without_parameters_is_refused():
    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="no parameters"):
        linen_model(Nothing(), jnp.zeros(4)).init(jax.random.key(0))
    with pytest.raises(ValueError, match="no parameters"):
        nnx_model(lambda rngs: nnx.Sequential(jnp.tanh))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_activation_stands_before_or_behind_the_norm(framework):
    facts, sizes = FACTS["group_norm_cnn"], dict(channels=(8, 16), activation="relu")
    build = lambda **order: build_model(  # noqa: E731
        "group_norm_cnn", facts, framework=framework, **sizes, **order
    )
    first, last = build(), build(order="conv_relu_norm")
    params = jax.jit(last.init)(jax.random.key(0))
    x = np.asarray(batch_of(facts, 1))
    example = jnp.asarray(x[0]), jnp.int32(2)

    def by_hand(norm_last):
        leaves = {"/".join(map(str, k)): v for k, v in _flat(params)}
        get = lambda *words: next(  # noqa: E731
            v for k, v in leaves.items() if all(w in k for w in words)
        )
        h = jnp.asarray(x)
        for i in range(2):
            conv = jax.lax.conv_general_dilated(
                h,
                get(f"conv_{i}", "kernel"),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            h = conv + get(f"conv_{i}", "bias")
            h = jnp.maximum(h, 0) if norm_last else h
            parts = h.reshape(1, -1, 8, h.shape[-1] // 8)
            mean = parts.mean((1, 3), keepdims=True)
            parts = (parts - mean) / jnp.sqrt(parts.var((1, 3), keepdims=True) + 1e-6)
            h = parts.reshape(h.shape) * get(f"norm_{i}", "scale")
            h = h + get(f"norm_{i}", "bias")
            h = h if norm_last else jnp.maximum(h, 0)
            h = h.reshape(1, h.shape[1] // 2, 2, h.shape[2] // 2, 2, -1).mean((2, 4))
        logits = h.reshape(-1) @ get("output", "kernel") + get("output", "bias")
        return -jax.nn.log_softmax(logits)[2]

    assert abs(first.loss_fn(params, example) - by_hand(False)) < 1e-4
    assert abs(last.loss_fn(params, example) - by_hand(True)) < 1e-4
    assert abs(by_hand(True) - by_hand(False)) > 1e-2


def _flat(params):
    found = jax.tree_util.tree_leaves_with_path(params)
    return [((jax.tree_util.keystr(path),), leaf) for path, leaf in found]


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="known are conv_norm_relu, conv_relu_norm"):
        build_model("group_norm_cnn", FACTS["group_norm_cnn"], order="relu_conv")


@pytest.mark.parametrize(
    ("name", "facts", "options", "words"),
    [
        ("mlpp", "mlp", {}, "did you mean mlp"),
        ("mlp", "mlp", {"channels": (1, 2)}, "has no size channels; it takes hidden"),
        ("mlp", "mlp", {"framework": "keras"}, "known are linen, nnx"),
        ("cnn", "mlp", {}, "images of at least 20 x 20"),
        ("cnn", "cnn", {"channels": (1, 2, 3)}, "two channels"),
        ("embedding", "mlp", {}, "takes token ids"),
        ("tabular", "mlp", {}, "takes categorical columns"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name, facts, options, words):
    with pytest.raises(ValueError, match=words):
        build_model(name, FACTS[facts], **options)
