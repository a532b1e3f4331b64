"""Batch norm is found in the program of a loss, and no other norm is taken for it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dp_ilg
from dp_ilg.clipping.purity import check_loss

hk = pytest.importorskip("haiku")
ROW, IMAGE = jnp.ones(3), jnp.ones((8, 8, 3))
THIN = jnp.ones((1, 8, 3))
REFUSED = "normalises (each number by itself|by the statistics of a batch).*GroupNorm"


def placed(batched):
    return (lambda x: x[None]) if batched else (lambda x: x)


def linen(norm, x, batched) -> Any:
    """Loss and parameters of a linen network; state is written, and dropped."""
    first = nn.Conv(4, (3, 3)) if x.ndim == 3 else nn.Dense(4)
    net, place = nn.Sequential([first, norm, nn.Dense(1)]), placed(batched)
    variables = jax.eval_shape(net.init, jax.random.key(0), place(x))
    variables = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), variables)
    params = variables["params"]
    rest = {name: v for name, v in variables.items() if name != "params"}

    def loss(params, x):
        given = {"params": params, **rest}
        out: Any = net.apply(given, place(x), mutable=list(rest) or False)
        return (out[0] if rest else out).sum()

    return loss, params


def haiku(norm, x, batched) -> Any:
    place = placed(batched)

    def forward(x, train):
        x = hk.Conv2D(4, 3)(x) if x.ndim > 2 else hk.Linear(4)(x)
        return hk.Linear(1)(norm(x, train)).sum()

    net = hk.transform_with_state(forward)
    init = lambda key, x: net.init(key, x, True)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0), place(x))
    params, state = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    train = not getattr(norm, "frozen", False)
    return lambda p, x: net.apply(p, state, None, place(x), train)[0], params


def module(norm, x, batched) -> Any:
    rngs, place = nnx.Rngs(0), placed(batched)
    first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    first = first if x.ndim == 3 else nnx.Linear(3, 4, rngs=rngs)
    net = nnx.Sequential(first, norm(rngs), nnx.Linear(4, 1, rngs=rngs))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    states = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return lambda p, x: nnx.merge(graph, p, states[1])(place(x)).sum(), states[0]


def hk_batch_norm(x, train):
    return hk.BatchNorm(True, True, 0.9)(x, train)


def hk_frozen(x, train):
    return hk.BatchNorm(True, True, 0.9)(x, train)


hk_frozen.frozen = True
BATCH = functools.partial(nn.BatchNorm, use_running_average=False)
NORMS = [
    (linen, BATCH()),
    (linen, BATCH(use_fast_variance=False, dtype=jnp.bfloat16)),
    (linen, BATCH(use_scale=False, momentum=0.5)),
    (haiku, hk_batch_norm),
    (module, lambda rngs: nnx.BatchNorm(4, rngs=rngs)),
]
OTHERS = [
    (linen, nn.BatchNorm(use_running_average=True)),
    (linen, nn.LayerNorm()),
    (linen, nn.LayerNorm(use_fast_variance=False, dtype=jnp.bfloat16)),
    (linen, nn.GroupNorm(num_groups=2)),
    (linen, nn.RMSNorm()),
    (haiku, hk_frozen),
    (haiku, lambda x, train: hk.LayerNorm(-1, True, True)(x)),
    (haiku, lambda x, train: hk.RMSNorm(-1)(x)),
    (module, lambda rngs: nnx.BatchNorm(4, use_running_average=True, rngs=rngs)),
    (module, lambda rngs: nnx.LayerNorm(4, rngs=rngs)),
    (module, lambda rngs: nnx.RMSNorm(4, rngs=rngs)),
]
IMAGES_ONLY = [
    (linen, nn.InstanceNorm()),
    (haiku, lambda x, train: hk.InstanceNorm(True, True)(x)),
    (haiku, lambda x, train: hk.GroupNorm(2)(x)),
    (module, lambda rngs: nnx.InstanceNorm(4, rngs=rngs)),
    (module, lambda rngs: nnx.GroupNorm(4, num_groups=2, rngs=rngs)),
]


@pytest.mark.parametrize("x", [ROW, IMAGE], ids=["row", "image"])
@pytest.mark.parametrize("batched", [True, False], ids=["e[None]", "e"])
@pytest.mark.parametrize("build, norm", NORMS)
def test_batch_norm_is_refused(build, norm, x, batched):
    loss, params = build(norm, x, batched)
    with pytest.raises(ValueError, match=REFUSED):
        check_loss(loss, params, x)


THIN_TOO = pytest.param(THIN, marks=pytest.mark.slow, id="thin")


@pytest.mark.parametrize("x", [ROW, IMAGE, THIN_TOO])
@pytest.mark.parametrize("batched", [True, False], ids=["e[None]", "e"])
@pytest.mark.parametrize("build, norm", OTHERS)
def test_other_norms_pass(build, norm, x, batched):
    loss, params = build(norm, x, batched)
    check_loss(loss, params, x)


@pytest.mark.parametrize("x", [IMAGE, THIN], ids=["image", "thin"])
@pytest.mark.parametrize("build, norm", IMAGES_ONLY)
def test_norms_over_space_pass(build, norm, x):
    loss, params = build(norm, x, True)
    check_loss(loss, params, x)


@pytest.mark.parametrize("wrap", [nn.WeightNorm, nn.SpectralNorm])
def test_norms_of_weights_pass(wrap):
    net = wrap(nn.Dense(4))
    given = {} if wrap is nn.WeightNorm else {"update_stats": False}
    variables = net.init(jax.random.key(0), ROW[None], **given)
    params = variables["params"]
    rest = {name: v for name, v in variables.items() if name != "params"}

    def loss(params, x):
        out: Any = net.apply({"params": params, **rest}, x[None], **given)
        return out.sum()

    check_loss(loss, params, ROW)


def standard(x, axes):
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1)


PASS = {
    "weights of a 1x1 convolution": lambda w, x: (x @ standard(w[None], 0)[0]).sum(),
    "every feature together": lambda w, x: (standard(x[None] @ w, None)).sum(),
    "a sequence of one": lambda w, x: standard(x[None] @ w, -1).sum(),
    "an example's own channels": lambda w, x: (
        standard(jnp.stack([x, 2 * x])[None], (0, 1)) @ w
    ).sum(),
    "centred, not scaled": lambda w, x: ((x[None] @ w) - (x[None] @ w).mean(0)).sum(),
    "a mean of one loss": lambda w, x: jnp.square(x[None] @ w).mean(0).sum(),
    "a regulariser": lambda w, x: (x @ w).sum() + standard(w, 0).sum(),
}
FAIL = {
    "by hand": lambda w, x: standard(x[None] @ w, 0).sum(),
    "in jit": lambda w, x: jax.jit(standard, static_argnums=1)(x[None] @ w, 0).sum(),
    "in remat": lambda w, x: jax.checkpoint(lambda v: standard(v, 0))(x[None] @ w)
    .sum(),
    "in a scan": lambda w, x: jax.lax.scan(
        lambda c, _: (standard(c @ w, 0), None), x[None], None, 2
    )[0].sum(),
    "several views": lambda w, x: standard(jnp.stack([x, 2 * x])[:, None] @ w, 1).sum(),
    "vmapped": lambda w, x: jax.vmap(lambda v: standard(v[None] @ w, 0))(
        jnp.stack([x, 2 * x])
    ).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", PASS)
def test_what_looks_like_it_and_is_not(name):
    check_loss(PASS[name], jnp.ones((3, 3)), ROW)


@pytest.mark.parametrize("name", FAIL)
def test_hidden_forms_are_found(name):
    with pytest.raises(ValueError, match=REFUSED):
        check_loss(FAIL[name], jnp.ones((3, 3)), ROW)


def test_what_is_refused_has_no_gradient():
    """The reason for it, and that a gradient by hand is refused as well."""
    loss, params = linen(BATCH(), ROW, True)
    params = jax.tree.map(lambda p: p + 0.5, params)
    gradient = jax.grad(loss)(params, ROW)
    assert not jnp.any(jnp.abs(gradient["layers_0"]["kernel"]) > 1e-5)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match=REFUSED):
        grad_fn(params, ROW[None], geometry=dp_ilg.Geometry.uniform(params))
