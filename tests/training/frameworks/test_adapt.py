"""Every framework's row against the framework's own per-example gradients."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dp_ilg
from dp_ilg.training.frameworks.adapt import FRAMEWORKS, adapt, framework_of
from dp_ilg.training.frameworks.keys import example_keys
from dp_ilg.training.frameworks.losses import keyed
from dp_ilg.training.frameworks.modules import reseeded

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
KEYS = example_keys(jax.random.key(5), 2, np.arange(4))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))[0]


class OwnState(TrainState):
    note: str = "mine"


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(2.0))
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.layers[0](x)) * self.scale[...].astype(x.dtype)
        return self.head(self.drop(x))[0]


class EqxNet(eqx.Module):
    first: Any
    drop: Any
    head: Any
    places: jax.Array
    activation: Any

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first, self.head = (
            eqx.nn.Linear(3, 4, key=one),
            eqx.nn.Linear(4, 1, key=two),
        )
        self.drop, self.places = eqx.nn.Dropout(0.5), jnp.arange(4)[::-1]
        self.activation = jnp.tanh

    def __call__(self, x, key):
        x = self.activation(self.first(x))[self.places]
        return self.head(self.drop(x, key=key))[0]


def cast(tree, dtype):
    is_float = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def plain(dtype):
    """Model, loss, and the framework's own gradient of one example."""
    params = {"w": jnp.arange(3.0).astype(dtype), "b": jnp.ones((), dtype)}

    def loss(params, x, key):
        keep = jax.random.bernoulli(key, 0.5, (3,))
        return jnp.sum(params["w"] * x * keep) ** 2 + params["b"]

    return params, loss, lambda x, key: jax.grad(loss)(params, x, key)


def haiku(dtype):
    def forward(x):
        x = jnp.tanh(hk.Linear(4)(x))
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, x))[0]

    net = hk.transform(forward)
    params = cast(net.init(jax.random.key(0), X[0]), dtype)
    loss = lambda params, x, key: net.apply(params, key, x) ** 2  # noqa: E731
    return params, loss, lambda x, key: jax.grad(loss)(params, x, key)


def linen(dtype):
    net = LinenNet()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = cast(net.init(keys, X[0])["params"], dtype)
    state = OwnState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))

    def loss(params, x, *, rng):
        out: Any = net.apply({"params": params}, x, rngs={"dropout": rng})
        return out**2

    return state, loss, lambda x, key: jax.grad(loss)(state.params, x, rng=key)


def flax_nnx(dtype):
    net = NNXNet(nnx.Rngs(0))
    nnx.update(net, cast(nnx.state(net, nnx.Param), dtype))

    def loss(model, x):
        return model(x) ** 2

    graph, *states = nnx.split(net, nnx.RngState, ...)
    rngs, rest = map(nnx.to_pure_dict, states)

    def own(x, key):
        copy = nnx.merge(graph, reseeded(rngs, key), rest)
        found = nnx.grad(loss)(copy, x)
        return nnx.to_pure_dict(found)

    return net, loss, own


def equinox(dtype):
    net = cast(EqxNet(jax.random.key(0)), dtype)
    loss = lambda model, x, key: model(x, key) ** 2  # noqa: E731
    return net, loss, lambda x, key: eqx.filter_grad(loss)(net, x, key)


CASES = [plain, haiku, linen, flax_nnx, equinox]


def floats(tree):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gradients_are_those_of_the_framework(case, dtype):
    model, loss, own = case(dtype)
    adapted, x = adapt(model, loss), X.astype(dtype)
    assert adapted.random
    gradients = jax.vmap(jax.grad(adapted.loss), (None, 0, 0))
    found = jax.jit(gradients)(adapted.params, x, KEYS)
    assert jax.tree.structure(adapted.params) == jax.tree.structure(found)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    atol = 1e-5 if dtype == jnp.float32 else 0.1
    for a, b in zip(
        floats(found), floats(jax.jit(jax.vmap(own))(x, KEYS)), strict=True
    ):
        np.testing.assert_allclose(a, b, 0.05, atol)
        assert np.abs(a).max() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_so_they_are_without_jit(case):
    model, loss, own = case(jnp.float32)
    adapted = adapt(model, loss)
    found = jax.grad(adapted.loss)(adapted.params, X[0], KEYS[0])
    for a, b in zip(floats(found), floats(own(X[0], KEYS[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_clipped_sums_are_those_of_the_framework(case):
    """The clip with a bound that cuts, through the fast engine, under jit."""
    model, loss, own = case(jnp.float32)
    adapted = adapt(model, loss)
    grad_fn = dp_ilg.clipped_grad(
        lambda params, row: adapted.loss(params, *row), l2_clip_norm=0.5
    )
    geometry = dp_ilg.Geometry.uniform(adapted.params)
    clipped = jax.jit(functools.partial(grad_fn, geometry=geometry))(
        adapted.params, (X, KEYS)
    )
    rows = [leaf.astype(float) for leaf in floats(jax.jit(jax.vmap(own))(X, KEYS))]
    norms = np.sqrt(sum(np.sum(leaf.reshape(4, -1) ** 2, 1) for leaf in rows))
    scales = np.minimum(1, 0.5 / np.maximum(norms, 1e-9))
    assert scales.min() < 1
    for a, b in zip(floats(clipped.gradients), rows, strict=True):
        total = np.tensordot(scales, b, 1)
        np.testing.assert_allclose(a, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_is_rebuilt_is_the_users_own_kind(case):
    model, loss, _ = case(jnp.float32)
    adapted = adapt(model, loss)
    moved = jax.tree.map(lambda p: p + 1, adapted.params)
    rebuilt = adapted.rebuild(moved)
    assert type(rebuilt) is type(model)
    again = adapt(rebuilt, loss)
    assert jax.tree.structure(again.params) == jax.tree.structure(moved)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)
    one = adapted.loss(moved, X[0], KEYS[0])
    assert one == again.loss(again.params, X[0], KEYS[0])
    before = adapt(model, loss).params  # the user's own object is as it was
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(adapted.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert getattr(rebuilt, "note", "mine") == "mine"


def test_every_row_is_met():
    models = [case(jnp.float32)[0] for case in CASES]
    net = NNXNet(nnx.Rngs(0))
    models.append((net, nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)))
    assert {framework_of(m).name for m in models} == {row.name for row in FRAMEWORKS}
    assert framework_of({"a": EqxNet(jax.random.key(0))}).name == "equinox.Module"


def test_frozen_arrays_may_be_an_argument():
    adapted = adapt(*flax_nnx(jnp.float32)[:2])
    doubled = jax.tree.map(
        lambda x: 2 * x if x.dtype == jnp.float32 else x, adapted.frozen
    )
    found = jax.jit(adapted.loss_with)(doubled, adapted.params, X[0], KEYS[0])
    assert found != adapted.loss(adapted.params, X[0], KEYS[0])
    with jax.checking_leaks():
        jax.jit(adapted.loss)(adapted.params, X[1], KEYS[1])


def test_nnx_streams_differ_by_example_and_by_stream():
    class Two(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(64))
            self.one, self.two = (nnx.Dropout(0.5, rngs=nnx.Rngs(3)) for _ in range(2))

    def loss(model, x):
        masks = jnp.stack([model.one(model.w[...]), model.two(model.w[...])])
        return masks.sum() + x, masks

    adapted = adapt(Two(), loss)
    masks = jax.jit(jax.vmap(adapted.loss, (None, 0, 0)))(
        adapted.params, X[:, 0], KEYS
    )[1]
    flat = np.asarray(masks).reshape(8, 64)
    assert len(np.unique(flat, axis=0)) == 8  # though both were seeded with 3
    again = jax.vmap(adapted.loss, (None, 0, 0))(adapted.params, X[:, 0], KEYS)[1]
    np.testing.assert_array_equal(masks, again)  # no count went on
    with pytest.raises(ValueError, match="no key was given"):
        adapted.loss(adapted.params, X[0, 0])


def test_wrt_chooses_what_is_trained():
    class Mine(nnx.Param):
        pass

    class Net(nnx.Module):
        def __init__(self):
            self.base, self.own = nnx.Param(jnp.ones(2)), Mine(jnp.ones(2))

    net = Net()
    loss = lambda m, x: jnp.sum(m.base[...] * m.own[...]) * x  # noqa: E731
    assert sorted(adapt(net, loss).params) == ["base", "own"]
    own = adapt(net, loss, wrt=Mine)
    assert sorted(own.params) == ["own"] and len(jax.tree.leaves(own.frozen)) == 1
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=Mine)
    assert sorted(adapt((net, optimizer), loss).params) == ["own"]
    rebuilt, kept = adapt((net, optimizer), loss).rebuild({"own": jnp.zeros(2)})
    assert kept is optimizer and rebuilt.own[...].sum() == 0 and rebuilt.base[0] == 1
    model = EqxNet(jax.random.key(0))
    spec = eqx.tree_at(
        lambda t: t.head.weight, jax.tree.map(lambda _: False, model), True
    )
    assert len(jax.tree.leaves(adapt(model, lambda m, x: 0.0, wrt=spec).params)) == 1


def test_model_and_optimizer_in_one():
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    both = nnx.ModelAndOptimizer(net, optax.sgd(0.1))
    adapted = adapt(both, lambda m, x: m(x)[0])
    rebuilt = adapted.rebuild(jax.tree.map(jnp.zeros_like, adapted.params))
    assert isinstance(rebuilt, nnx.ModelAndOptimizer)
    assert rebuilt.model.kernel[...].sum() == 0 and both.model.kernel[...].sum() != 0


def test_tied_weights_have_one_gradient():
    class Tied(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.two = self.one

        def __call__(self, x):
            return jnp.sum(self.two(jnp.tanh(self.one(x))) ** 2)

    net = Tied()
    adapted = adapt(net, lambda net, x: net(x))
    found = jax.jit(jax.grad(adapted.loss))(adapted.params, X[0])
    own = nnx.to_pure_dict(nnx.grad(lambda net: net(X[0]))(net))
    for a, b in zip(floats(found), floats(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    rebuilt = adapted.rebuild(found)
    assert rebuilt.two is rebuilt.one


def test_losses_that_frameworks_compiled():
    net = EqxNet(jax.random.key(0))
    loss = eqx.filter_jit(lambda model, x, key: model(x, key) ** 2)
    adapted = adapt(net, loss)
    assert adapted.random
    value = jax.jit(adapted.loss)(adapted.params, X[0], KEYS[0])
    np.testing.assert_allclose(value, net(X[0], KEYS[0]) ** 2, rtol=1e-5)


def counted_in_jit(model, x):
    return nnx.jit(counting)(model, x)


def counted_in_scan(model, x):
    axes = nnx.StateAxes({...: nnx.Carry})

    @nnx.scan(in_axes=(nnx.Carry, axes, 0), out_axes=(nnx.Carry, 0))
    def count(carry, model, x):
        return carry, counting(model, x)

    return count(jnp.zeros(()), model, x[None])[1].sum()


class Deep(nnx.Module):
    """Layers in a scan, each rematerialised, as large models have them."""

    def __init__(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(jax.random.key(0), 2))
        self.scale = nnx.Variable(jnp.float32(2.0))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def layer(x, linear):
            return jnp.tanh(linear(x))

        return jnp.sum(layer(x, self.layers)) * self.scale[...]


def test_transforms_that_write_all_back_change_nothing():
    module = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    jitted = adapt(module, nnx.jit(lambda model, x: model(x)[0]))
    np.testing.assert_allclose(jitted.loss(jitted.params, X[0]), module(X[0])[0], 1e-5)
    net = Deep()
    adapted = adapt(net, nnx.jit(lambda net, x: net(x)))
    found = jax.jit(jax.grad(adapted.loss))(adapted.params, X[0])
    own = nnx.to_pure_dict(nnx.grad(lambda net: net(X[0]))(net))
    for a, b in zip(floats(found), floats(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def linear():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class Counts(nnx.Module):
    def __init__(self):
        self.w, self.count = nnx.Param(jnp.ones(2)), nnx.Variable(jnp.zeros(()))


class Normed(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def counting(model, x):
    model.count[...] += 1
    return jnp.sum(model.w[...] * x)


def growing(model, x):
    model.extra = nnx.Variable(x)
    return jnp.sum(model.w[...] * x)


def state_class(params):
    return TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))


two = lambda m, x: jnp.sum(x)  # noqa: E731
W, STATS = {"w": jnp.ones(2)}, {"batch_stats": jnp.ones(2)}
OPTIMIZER = nnx.Optimizer(linear(), optax.sgd(1.0), wrt=nnx.Param)
NORM = functools.partial(eqx.nn.BatchNorm, 2, "batch", mode="batch")
STATEFUL = eqx.nn.make_with_state(NORM)(inference=True)
REFUSED = [
    ((Normed(), two), {}, ValueError, r"BatchNorm \(norm\).*GroupNorm"),
    ((OPTIMIZER, two), {}, ValueError, "holds no module"),
    ((linear(), two), {"wrt": nnx.BatchStat}, ValueError, "holds no array"),
    ((W, two), {"wrt": nnx.Param}, ValueError, "by_module"),
    (({"w": jnp.ones(2, int)}, two), {}, TypeError, "int32 at"),
    (({"params": W, **STATS}, two), {}, ValueError, "GroupNorm"),
    ((state_class(STATS), two), {}, ValueError, "use_running_average"),
    (({}, two), {}, ValueError, "no array to be trained"),
    ((LinenNet(), two), {}, TypeError, "LinenNet, which has init and apply"),
    ((hk.transform(two), two), {}, TypeError, "Transformed, which has init and apply"),
    ((W, 3), {}, TypeError, "loss_fn"),
    ((W, lambda m: 0), {}, TypeError, r"1 arguments \(m\)"),
    ((W, lambda m, x, y, k: 0), {}, TypeError, "functools.partial"),
    ((NORM(), two), {}, ValueError, "inference_mode"),
    ((STATEFUL, two), {}, ValueError, "frozen statistics"),
]


@pytest.mark.parametrize("given, kwargs, error, sentence", REFUSED)
def test_what_cannot_be_trained_is_refused(given, kwargs, error, sentence):
    with pytest.raises(error, match=sentence):
        adapt(*given, **kwargs)


@pytest.mark.parametrize(
    "loss",
    [counting, growing, counted_in_jit, counted_in_scan],
    ids=lambda f: f.__name__,
)
def test_a_loss_that_writes_into_its_module_is_refused(loss):
    adapted = adapt(Counts(), loss)
    with pytest.raises(ValueError, match=r"writes (count|extra) \(Variable\)"):
        jax.jit(adapted.loss)(adapted.params, X[0, :2])


def test_frozen_statistics_and_what_is_sown_are_welcome():
    model = Normed()
    model.set_attributes(nnx.BatchNorm, use_running_average=True)

    def loss(model, x):
        out = model.norm(model.w[...] * x)
        model.seen = nnx.Intermediate(out)
        return out.sum()

    adapted = adapt(model, loss)
    assert jax.grad(adapted.loss)(adapted.params, X[0, :2])["w"].any()
    frozen = eqx.nn.inference_mode(eqx.nn.BatchNorm(2, "batch", mode="batch"))
    assert adapt(frozen, two).framework == "equinox.Module"


def test_losses_of_two_and_three_arguments():
    assert not keyed(lambda model, example, *, scale=1.0: 0)[1]
    assert not keyed(lambda model, example, train=True: 0)[1]
    assert not keyed(lambda *args: 0)[1]
    assert not keyed(functools.partial(lambda scale, m, x: 0, 2.0))[1]
    assert keyed(jax.jit(lambda model, example, key: 0))[1]
    assert keyed(lambda model, example, rng=None: rng)[0](0, 0, 5) == 5
    assert keyed(lambda model, example, *, rngs: rngs)[0](0, 0, 5) == 5
    aux = adapt({"w": jnp.ones(2)}, lambda p, x: (p["w"] @ x, {"twice": 2 * x}))
    assert aux.loss(aux.params, X[0, :2])[1]["twice"].shape == (2,)
