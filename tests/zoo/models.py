"""Cases: attention, normalisation and small models of five libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from tests.zoo.core import (
    Case,
    Table,
    batch_of,
    float_type,
    floats,
    ids,
    key,
    readout,
    real,
    weight,
)

CASES = Table()
case = CASES.case
X = real(4, 6)
QKV = {name: weight(6, 6) for name in "qkvo"}


# Attention and normalisation by hand.
def heads(x: Any, count: int = 2) -> Any:
    """Splits the last axis into heads: [tokens, d] to [heads, tokens, d / heads]."""
    return x.reshape(x.shape[0], count, -1).transpose(1, 0, 2)


def attend(q: Any, k: Any, v: Any, mask: Any = True) -> Any:
    """Softmax attention of [heads, tokens, d]."""
    scores = jnp.einsum("hqd,hkd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.einsum("hqk,hkd->qhd", weights, v).reshape(q.shape[1], -1)


def causal(count: int) -> np.ndarray:
    """Which keys each query may see."""
    return np.tri(count, dtype=bool)


def attention(p: Any, x: Any, mask: Any = True) -> Any:
    """Multi-head self-attention with four matrices."""
    q, k, v = (heads(x @ p[name]) for name in "qkv")
    return attend(q, k, v, mask) @ p["o"]


def layer_norm(x: Any, scale: Any = 1.0, bias: Any = 0.0) -> Any:
    """Layer normalisation of the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(centred.var(-1, keepdims=True) + 0.1) * scale + bias


def rms_norm(x: Any, scale: Any) -> Any:
    """Root-mean-square normalisation of the last axis."""
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * scale


case("attention", QKV, X)(attention)
case("attention_causal", QKV, X)(lambda p, x: attention(p, x, causal(4)))
case("attention_padded", QKV, (X, ids(1, 5)))(
    lambda p, x: attention(p, x[0], jnp.arange(4) < x[1])
)
case("attention_fused", {"qkv": weight(6, 18), "o": weight(6, 6)}, X)(
    lambda p, x: attend(*map(heads, jnp.split(x @ p["qkv"], 3, 1))) @ p["o"]
)
case("attention_fused_sliced", {"qkv": weight(6, 18)}, (X, X))(
    lambda p, x: attend(
        heads(x[0] @ p["qkv"][:, :6]),
        *map(heads, jnp.split(x[1] @ p["qkv"][:, 6:], 2, 1)),
    )
)
case("attention_shared_keys_values", {"q": weight(6, 6), "k": weight(6, 6)}, X)(
    lambda p, x: attend(heads(x @ p["q"]), heads(x @ p["k"]), heads(x @ p["k"]))
)
case("attention_multi_query", {"q": weight(6, 6), "k": weight(6, 3)}, X)(
    lambda p, x: attend(
        heads(x @ p["q"]), heads(x @ p["k"], 1), heads(jnp.tanh(x) @ p["k"], 1)
    )
)
case("attention_rank3_kernels", {n: weight(6, 2, 3) for n in "qkv"}, X)(
    lambda p, x: attend(*(jnp.einsum("ti,ihd->htd", x, p[n]) for n in "qkv"))
)
case("attention_query_parameter", {"q": weight(2, 6), "k": weight(6, 6)}, X)(
    lambda p, x: attend(heads(p["q"]), heads(x @ p["k"]), heads(x))
)
case("attention_relative_bias", QKV | {"r": weight(7, 2)}, X)(
    lambda p, x: (
        jax.nn.softmax(
            jnp.einsum("hqd,hkd->hqk", heads(x @ p["q"]), heads(x @ p["k"]))
            + p["r"][np.arange(4)[:, None] - np.arange(4) + 3].transpose(2, 0, 1)
        )
        @ heads(x @ p["v"])
    )
)
case("attention_jax_nn", QKV, X)(
    lambda p, x: jax.nn.dot_product_attention(
        *(heads(x @ p[n]).transpose(1, 0, 2) for n in "qkv"), is_causal=True
    )
)
case("attention_rotary", QKV, X)(
    lambda p, x: attend(
        rotated(heads(x @ p["q"], 1)), rotated(heads(x @ p["k"], 1)), heads(x, 1)
    )
)
case("norm_layer", {"s": weight(6), "b": weight(6)}, X)(
    lambda p, x: layer_norm(x, p["s"], p["b"])
)
case("norm_layer_between", {"a": weight(6, 5), "s": weight(5), "c": weight(5, 3)}, X)(
    lambda p, x: layer_norm(x @ p["a"], p["s"]) @ p["c"]
)
case("norm_rms", {"s": weight(6), "w": weight(6, 3)}, X)(
    lambda p, x: rms_norm(x, p["s"]) @ p["w"]
)
case("norm_rms_one_plus", {"s": weight(6), "w": weight(6, 3)}, X)(
    lambda p, x: jnp.tanh(rms_norm(x, 1 + p["s"]) @ p["w"])
)
case("norm_group", {"s": weight(6), "b": weight(6), "w": weight(6, 6)}, real(3, 3, 6))(
    lambda p, x: (
        layer_norm((x @ p["w"]).reshape(9, 3, 2).transpose(1, 0, 2).reshape(3, 18))
        .reshape(3, 9, 2)
        .transpose(1, 0, 2)
        .reshape(9, 6)
        * p["s"]
        + p["b"]
    )
)
case("norm_query_key", QKV | {"s": weight(3)}, X)(
    lambda p, x: attend(
        rms_norm(heads(x @ p["q"]), p["s"]),
        rms_norm(heads(x @ p["k"]), p["s"]),
        heads(x @ p["v"]),
    )
)
case(
    "transformer_block", QKV | {"s": weight(6), "f": weight(6, 8), "g": weight(8, 6)}, X
)(
    lambda p, x: (lambda h: h + jax.nn.gelu(layer_norm(h) @ p["f"]) @ p["g"])(
        x + attention(p, rms_norm(x, p["s"]), causal(4))
    )
)
case("swiglu", {"a": weight(6, 5), "b": weight(6, 5), "c": weight(5, 6)}, X)(
    lambda p, x: (jax.nn.silu(x @ p["a"]) * (x @ p["b"])) @ p["c"]
)
case("mixture_of_experts", {"r": weight(6, 3), "w": weight(3, 6, 2)}, X)(
    lambda p, x: jnp.einsum(
        "te,teo->to",
        jax.nn.softmax(x @ p["r"]),
        jnp.tanh(jnp.einsum("ti,eio->teo", x, p["w"])),
    )
)
case("mixture_of_experts_dispatched", {"r": weight(6, 3), "w": weight(3, 6, 2)}, X)(
    lambda p, x: (
        lambda chosen: jnp.einsum(
            "te,eto->to", chosen, jnp.einsum("te,ti,eio->eto", chosen, x, p["w"])
        )
    )(jax.nn.one_hot(jnp.argmax(x @ p["r"], 1), 3))
)
case("mixture_of_experts_gathered", {"r": weight(6, 3), "w": weight(3, 6, 2)}, X)(
    lambda p, x: jnp.einsum("ti,tio->to", x, p["w"][jnp.argmax(x @ p["r"], 1)])
)
case(
    "graph_network",
    {"m": weight(3, 3), "u": weight(3, 3)},
    (real(4, 3), ids(0, 4, 2, 6)),
)(
    lambda p, x: jnp.tanh(
        x[0] @ p["u"]
        + jax.ops.segment_sum(jnp.tanh(x[0] @ p["m"])[x[1][0]] @ p["m"], x[1][1], 4)
    )
)
case("autoencoder_tied", {"w": weight(6, 3), "b": weight(6)}, X)(
    lambda p, x: jax.nn.sigmoid(x @ p["w"]) @ p["w"].T + p["b"]
)
case("siamese", {"w": weight(6, 3)}, (X, X))(
    lambda p, x: jnp.sum(jnp.tanh(x[0] @ p["w"]) * jnp.tanh(x[1] @ p["w"]), 1)
)
case("contrastive", {"w": weight(6, 3)}, (X, X))(
    lambda p, x: jax.nn.log_softmax((x[0] @ p["w"]) @ (x[1] @ p["w"]).T)
)
case("deep_sets", {"a": weight(6, 4), "c": weight(4, 2)}, X)(
    lambda p, x: jnp.max(jax.nn.relu(x @ p["a"]), 0) @ p["c"]
)
case("cross_entropy", {"w": weight(6, 3), "b": weight(3)}, (X, ids(0, 3, 4)))(
    lambda p, x: optax.softmax_cross_entropy_with_integer_labels(
        x[0] @ p["w"] + p["b"], x[1]
    )
)
case("ctc", {"w": weight(6, 4)}, (X, ids(1, 4, 2)))(
    lambda p, x: optax.ctc_loss(
        (x[0] @ p["w"])[None], jnp.zeros((1, 4)), x[1][None], jnp.zeros((1, 2))
    )
)


def rotated(x: Any) -> Any:
    """Rotary position embedding of [heads, tokens, d]."""
    angle = np.arange(x.shape[1])[:, None] * 0.5 ** np.arange(x.shape[2] // 2)
    a, b = jnp.split(x, 2, -1)
    cos, sin = floats(np.cos(angle)), floats(np.sin(angle))
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# Augmentation multiplicity: one example, several views of it.
def view_loss(p: Any, x: Any) -> Any:
    """The loss of one view."""
    return readout(jnp.tanh(x @ p["a"]) @ p["c"])


VIEWS = {"a": weight(6, 5), "c": weight(5, 2)}
case("views_by_vmap", VIEWS, real(3, 4, 6))(
    lambda p, x: jnp.mean(jax.vmap(view_loss, (None, 0))(p, x))
)
case("views_by_loop", VIEWS, real(3, 4, 6))(
    lambda p, x: sum(view_loss(p, v) for v in x) / 3
)
case("views_by_scan", VIEWS, real(3, 4, 6))(
    lambda p, x: lax.scan(lambda s, v: (s + view_loss(p, v), None), 0.0, x)[0] / 3
)
case("views_random", VIEWS, (X, key()))(
    lambda p, x: jnp.mean(
        jax.vmap(lambda k: view_loss(p, x[0] + jax.random.normal(k, (4, 6))))(
            jax.random.split(x[1], 3)
        )
    )
)
case("views_of_images", {"w": weight(2, 2, 2, 3), "c": weight(3, 2)}, real(2, 4, 4, 2))(
    lambda p, x: jnp.mean(jax.vmap(lambda v: small_cnn(p, jnp.flip(v, 1)))(x), 0)
)


def small_cnn(p: Any, x: Any) -> Any:
    """Convolution, mean, dense."""
    y = lax.conv_general_dilated(
        x[None], p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jax.nn.relu(y[0]), (0, 1)) @ p["c"]


# Flax linen.
def linen(module: nn.Module, batch: Any, exact: nn.Module | None = None) -> Case:
    """A case of a linen module on one array."""
    shapes = jax.eval_shape(module.init, jax.random.key(1), batch[0])["params"]

    def loss_of(m: nn.Module) -> Callable:
        return lambda p, x: readout(m.apply({"params": p}, x))

    truth = None if exact is None else loss_of(exact)
    return Case(loss_of(module), filled(shapes), batch, truth)


def filled(shapes: Any) -> Any:
    """Random values for the parameters a library asks for, without its own start."""
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(5)
    return jax.tree.unflatten(tree, [weight(*x.shape)(rng, ()) for x in leaves])


@CASES.build
def linen_mlp() -> Case:
    """Dense, LayerNorm, Dense."""
    layers = [nn.Dense(5), nn.LayerNorm(), nn.gelu, nn.Dense(2)]
    return linen(nn.Sequential(layers), batch_of(3, 4))


@CASES.build
def linen_cnn() -> Case:
    """Conv, GroupNorm, strided Conv, Dense."""
    layers = [
        nn.Conv(4, (3, 3)),
        nn.GroupNorm(num_groups=2),
        nn.relu,
        nn.Conv(3, (2, 2), strides=2),
        lambda x: x.reshape(-1),
        nn.Dense(2),
    ]
    return linen(nn.Sequential(layers), batch_of(4, 4, 2))


@CASES.build
def linen_attention() -> Case:
    """Causal multi-head attention."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            mask = nn.make_causal_mask(x[:, 0])
            attend = nn.MultiHeadDotProductAttention(2, qkv_features=4, use_bias=False)
            return attend(x, x, mask=mask)

    return linen(Model(), batch_of(4, 6))


@CASES.build
def linen_lstm() -> Case:
    """A recurrent layer by ``nn.RNN``."""
    return linen(nn.RNN(nn.LSTMCell(3, param_dtype=float_type())), batch_of(4, 3))


@CASES.build
def linen_bidirectional_gru() -> Case:
    """Two recurrent layers, one backwards."""
    one, two = (nn.RNN(nn.GRUCell(3, param_dtype=float_type())) for _ in range(2))
    return linen(nn.Bidirectional(one, two), batch_of(4, 3))


class Block(nn.Module):
    """A residual block as ``nn.scan`` wants it."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        """Two dense layers and a sum."""
        return x + nn.Dense(4)(nn.tanh(nn.Dense(5)(nn.LayerNorm()(x)))), None


def stack_of(block: Any, axis: int = 0) -> nn.Module:
    """Three blocks with stacked parameters."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan: Any = nn.scan(
                block,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=3,
            )
            return scan()(x, None)[0]

    return Stack()


@CASES.build
def linen_scan_stack() -> Case:
    """Blocks stacked by ``nn.scan``."""
    return linen(stack_of(Block), batch_of(3, 4))


@CASES.build
def linen_scan_stack_axis1() -> Case:
    """Blocks stacked along axis 1."""
    return linen(stack_of(Block, axis=1), batch_of(3, 4))


@CASES.build
def linen_remat_scan_stack() -> Case:
    """Rematerialised blocks stacked by ``nn.scan``."""
    return linen(stack_of(nn.remat(Block)), batch_of(3, 4))


@CASES.build
def linen_vmapped_ensemble() -> Case:
    """Two networks with stacked parameters, by ``nn.vmap``."""
    vmap: Any = nn.vmap
    ensemble = vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )
    return linen(ensemble(features=3), batch_of(3, 4))


@CASES.build
def linen_embed_tied() -> Case:
    """``nn.Embed`` with ``attend``."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(7, 3)
            return embed.attend(nn.tanh(nn.Dense(3)(embed(tokens))))

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (5, 4)))
    return linen(Model(), tokens)


@CASES.build
def linen_norms() -> Case:
    """RMSNorm, weight normalisation and a transposed convolution."""
    layers = [
        nn.RMSNorm(),
        nn.WeightNorm(nn.Dense(4)),
        nn.ConvTranspose(3, (2,), strides=(2,)),
    ]
    return linen(nn.Sequential(layers), batch_of(3, 4))


@CASES.build
def linen_bf16() -> Case:
    """Computation in bfloat16 with float32 parameters."""

    def model(dtype: Any) -> nn.Module:
        layers = [nn.Dense(5, dtype=dtype), nn.tanh, nn.Dense(2, dtype=dtype)]
        return nn.Sequential(layers)

    return linen(model(jnp.bfloat16), batch_of(3, 4), exact=model(None))


@CASES.build
def linen_bf16_cnn() -> Case:
    """A convolution in bfloat16."""

    def model(dtype: Any) -> nn.Module:
        return nn.Sequential(
            [nn.Conv(3, (3, 3), dtype=dtype), nn.relu, nn.Dense(2, dtype=dtype)]
        )

    return linen(model(jnp.bfloat16), batch_of(4, 4, 2), exact=model(None))


# Flax NNX, Equinox, Haiku.
class NnxModel(nnx.Module):
    """Conv, norm and a shared dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (2, 2), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.dense

    def __call__(self, x: Any) -> Any:
        """Uses the dense layer twice."""
        y = self.norm(self.conv(x[None])[0])
        return self.again(nnx.relu(self.dense(y)))


@CASES.build
def nnx_split_merge() -> Case:
    """An NNX model by split and merge."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))
    call = lambda p, x: readout(nnx.merge(graph, p)(x))  # noqa: E731
    return Case(call, filled(shapes), batch_of(3, 3, 2))


@CASES.build
def nnx_pure_dict() -> Case:
    """Parameters of an NNX model as a plain dictionary, with an embedding."""
    wide = dict(dtype=float_type(), param_dtype=float_type())
    embed = nnx.Embed(6, 3, rngs=nnx.Rngs(0), **wide)
    graph, state = nnx.split(embed)
    params = filled(nnx.to_pure_dict(state))

    def loss(p: Any, tokens: Any) -> Any:
        merged = nnx.merge(graph, _replaced(state, p))
        return readout(merged.attend(jnp.tanh(merged(tokens))))

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 6, (5, 4)))
    return Case(loss, params, tokens)


def _replaced(state: Any, values: Any) -> Any:
    """A copy of an NNX state with other values."""
    copy = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(copy, values)
    return copy


def equinox_case(model: Any, batch: Any) -> Case:
    """A case of an Equinox module on one array."""
    shapes, static = eqx.partition(model, is_shape)
    call = lambda p, x: readout(eqx.combine(p, static)(x))  # noqa: E731
    return Case(call, filled(shapes), batch)


def is_shape(leaf: Any) -> bool:
    """Whether ``eqx.filter_eval_shape`` made this leaf of an array."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def equinox_shapes(make: Callable, *args: Any, **options: Any) -> Any:
    """An Equinox module without its arrays, so that nothing is computed."""
    key = jax.random.key(0)
    return eqx.filter_eval_shape(lambda: make(*args, **options, key=key))


@CASES.build
def equinox_mlp() -> Case:
    """An Equinox MLP."""
    return equinox_case(equinox_shapes(eqx.nn.MLP, 4, 2, 5, 2), batch_of(4))


@CASES.build
def equinox_cnn() -> Case:
    """Channels first, pooled, normalised."""
    layers = [
        equinox_shapes(eqx.nn.Conv2d, 2, 4, 3),
        eqx.filter_eval_shape(eqx.nn.GroupNorm, 2, 4),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.AvgPool2d(2, 2),
        equinox_shapes(eqx.nn.ConvTranspose2d, 4, 2, 2),
    ]
    return equinox_case(eqx.nn.Sequential(layers), batch_of(2, 6, 6))


@CASES.build
def equinox_gru() -> Case:
    """A GRU cell scanned by hand."""
    shapes, static = eqx.partition(equinox_shapes(eqx.nn.GRUCell, 3, 4), is_shape)

    def loss(p: Any, x: Any) -> Any:
        gru = eqx.combine(p, static)
        start = jnp.zeros(4, float_type())
        return readout(lax.scan(lambda h, v: (gru(v, h), None), start, x)[0])

    return Case(loss, filled(shapes), batch_of(4, 3))


@CASES.build
def equinox_attention() -> Case:
    """Equinox multi-head attention."""
    layer = equinox_shapes(eqx.nn.MultiheadAttention, 2, 4)
    shapes, static = eqx.partition(layer, is_shape)
    call = lambda p, x: readout(eqx.combine(p, static)(x, x, x))  # noqa: E731
    return Case(call, filled(shapes), batch_of(3, 4))


def haiku_case(function: Callable, batch: Any) -> Case:
    """A case of a Haiku function on one array."""
    net = hk.without_apply_rng(hk.transform(function))
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch[0])
    return Case(lambda p, x: readout(net.apply(p, x)), filled(shapes), batch)


@CASES.build
def haiku_cnn() -> Case:
    """Haiku convolution, layer norm and MLP."""

    def function(x: Any) -> Any:
        y = hk.Conv2D(3, 3)(x[None])[0]
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(y)
        return hk.nets.MLP([4, 2])(y)

    return haiku_case(function, batch_of(4, 4, 2))


@CASES.build
def haiku_lstm() -> Case:
    """Haiku LSTM, unrolled by ``hk.dynamic_unroll``."""

    def function(x: Any) -> Any:
        core = hk.LSTM(3)
        state = core.initial_state(None)
        start = jax.tree.map(lambda v: v.astype(float_type()), state)
        return hk.dynamic_unroll(core, x, start)[0]

    return haiku_case(function, batch_of(4, 3))


@CASES.build
def haiku_layer_stack() -> Case:
    """Haiku layers stacked by ``hk.layer_stack``."""

    def function(x: Any) -> Any:
        return hk.layer_stack(3)(lambda h: h + jnp.tanh(hk.Linear(4)(h)))(x)

    return haiku_case(function, batch_of(3, 4))
