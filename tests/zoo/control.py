"""Cases: loops, branches, rematerialisation, custom derivatives, odd primitives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.zoo.core import Table, ids, real, weight

CASES = Table()
case = CASES.case
SQUARE, Y = {"w": weight(4, 4)}, real(3, 4)
CELL = {"w": weight(4, 4), "u": weight(4, 4), "b": weight(4)}
STACK = {"w": weight(3, 4, 4), "b": weight(3, 4)}


def cell(p: Any, h: Any, x: Any) -> Any:
    """An Elman cell."""
    return jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"])


def recur(p: Any, x: Any, **options: Any) -> Any:
    """Runs `cell` over the first axis of x and gives every state."""

    def step(h: Any, v: Any) -> Any:
        h = cell(p, h, v)
        return h, h

    return lax.scan(step, jnp.zeros(4, x.dtype), x, **options)[1]


@jax.jit
def jitted_layer(w: Any, x: Any) -> Any:
    """A layer under its own jit."""
    return jnp.tanh(x @ w)


def gru(p: Any, x: Any, **options: Any) -> Any:
    """A GRU with fused gates."""

    def step(h: Any, v: Any) -> Any:
        r, z = jnp.split(jax.nn.sigmoid(v @ p["i"][:, :6] + h @ p["h"][:, :6]), 2)
        n = jnp.tanh(v @ p["i"][:, 6:] + r * (h @ p["h"][:, 6:]) + p["b"])
        h = (1 - z) * n + z * h
        return h, h

    return lax.scan(step, jnp.zeros(3, x.dtype), x, **options)[1]


def lstm(p: Any, x: Any, **options: Any) -> Any:
    """An LSTM with fused gates."""

    def step(carry: Any, v: Any) -> Any:
        h, c = carry
        gates = v @ p["i"] + h @ p["h"] + p["b"]
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(3, x.dtype)
    return lax.scan(step, (zero, zero), x, **options)[1]


def residual(p: Any, h: Any) -> Any:
    """A residual layer."""
    return h + jnp.tanh(h @ p["w"] + p["b"])


def stacked(p: Any, x: Any, **options: Any) -> Any:
    """Runs `residual` layers whose weights are stacked along axis 0."""
    return lax.scan(lambda h, q: (residual(q, h), None), x, p, **options)[0]


GRU = {"i": weight(4, 9), "h": weight(3, 9), "b": weight(3)}
LSTM = {"i": weight(4, 12), "h": weight(3, 12), "b": weight(12)}
case("scan_elman", CELL, real(5, 4))(recur)
case("scan_elman_unrolled", CELL, real(5, 4))(lambda p, x: recur(p, x, unroll=2))
case("scan_elman_one_step", CELL, real(1, 4))(recur)
case("scan_gru", GRU, real(4, 4))(gru)
case("scan_gru_reversed", GRU, real(4, 4))(lambda p, x: gru(p, x, reverse=True))
case("scan_lstm", LSTM, real(4, 4))(lstm)
case("scan_lstm_reversed", LSTM, real(4, 4))(lambda p, x: lstm(p, x, reverse=True))
case("scan_lstm_bidirectional", {"f": LSTM, "r": LSTM}, real(4, 4))(
    lambda p, x: jnp.concatenate([lstm(p["f"], x), lstm(p["r"], x, reverse=True)], -1)
)
case("scan_lstm_both_ways_tied", LSTM, real(4, 4))(
    lambda p, x: (lstm(p, x), lstm(p, x, reverse=True))
)
case("scan_lstm_two_layers", {"a": LSTM, "w": weight(3, 4), "b": LSTM}, real(4, 4))(
    lambda p, x: lstm(p["b"], lstm(p["a"], x) @ p["w"])[-1]
)
case("scan_lstm_of_embeddings", {"e": weight(7, 4)} | LSTM, ids(0, 7, 5))(
    lambda p, t: lstm(p, p["e"][t])
)
case("scan_masked_steps", CELL, (real(5, 4), ids(0, 2, 5)))(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.where(v[1] > 0, cell(p, h, v[0]), h), None), jnp.zeros(4), x
    )[0]
)
case("scan_lookup_inside", {"e": weight(7, 4), "w": weight(4, 4)}, ids(0, 7, 5))(
    lambda p, t: lax.scan(
        lambda h, i: (jnp.tanh(h @ p["w"] + p["e"][i]), None), jnp.zeros(4), t
    )[0]
)
case("scan_feeds_back_tied", {"e": weight(5, 4), "w": weight(4, 4)}, real(4))(
    lambda p, x: lax.scan(
        lambda h, _: (jnp.tanh(h @ p["w"]), h @ p["e"].T @ p["e"]), x, None, length=3
    )
)
case("scan_conv_inside", {"w": weight(3, 2, 2)}, real(6, 2))(
    lambda p, x: lax.scan(
        lambda h, _: (
            jnp.tanh(
                lax.conv_general_dilated(
                    h[None], p["w"], (1,), "SAME", dimension_numbers=CHANNELS_LAST
                )[0]
            ),
            None,
        ),
        x,
        None,
        length=3,
    )[0]
)
case("scan_parameter_graph_inside", SQUARE | {"g": weight(4)}, real(5, 4))(
    lambda p, x: lax.scan(
        lambda h, v: (
            jnp.tanh(h @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"])) + v),
            None,
        ),
        jnp.zeros(4),
        x,
    )[0]
)
case("scan_bias_and_scale_inside", {"s": weight(4), "b": weight()}, real(5, 4))(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh(h * p["s"] + v + p["b"]), h), jnp.zeros(4), x
    )
)
case("scan_initial_state", CELL | {"h": weight(4)}, real(5, 4))(
    lambda p, x: lax.scan(lambda h, v: (cell(p, h, v), None), p["h"], x)[0]
)
case("scan_weight_in_the_carry", SQUARE, real(3, 4))(
    lambda p, x: lax.scan(
        lambda c, v: ((jnp.tanh(c[0] @ c[1] + v), c[1]), None),
        (jnp.zeros(4), p["w"]),
        x,
    )[0][0]
)
case("scan_weight_changes_in_the_carry", SQUARE, real(3, 4))(
    lambda p, x: lax.scan(
        lambda c, v: ((jnp.tanh(c[0] @ c[1] + v), 0.9 * c[1]), None),
        (jnp.zeros(4), p["w"]),
        x,
    )[0][0]
)
case("scan_weight_learns_in_the_carry", {"w": weight(3, 2)}, real(4, 3))(
    lambda p, x: lax.scan(
        lambda w, v: (w - 0.1 * jnp.outer(v, v @ w), v @ w), p["w"], x
    )
)
case("scan_of_slices", {"w": weight(4, 8)}, real(3, 4))(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh(h @ p["w"][:, :4] + v @ p["w"][:, 4:]), None),
        jnp.zeros(4),
        x,
    )[0]
)
case("scan_weight_by_counter", STACK, real(4))(
    lambda p, x: lax.scan(
        lambda h, i: (jnp.tanh(h @ p["w"][i] + p["b"][i]), None), x, jnp.arange(3)
    )[0]
)
case("scan_weight_by_data", STACK, (real(4), ids(0, 3, 4)))(
    lambda p, x: lax.scan(
        lambda h, i: (jnp.tanh(h @ p["w"][i] + p["b"][i]), None), x[0], x[1]
    )[0]
)
case("scan_rows_of_a_weight", {"w": weight(5, 3)}, real(3))(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h * w + x), h @ w), x, p["w"])
)
case("scan_weight_rows_with_data", {"w": weight(5, 3)}, real(5, 3))(
    lambda p, x: lax.scan(
        lambda h, wx: (jnp.tanh(h + wx[0] * wx[1]), None), jnp.zeros(3), (p["w"], x)
    )[0]
)
case("scan_only_over_parameters", {"w": weight(4, 4), "v": weight(4)}, real(4))(
    lambda p, x: (
        x * lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), p["v"], None, 3)[0]
    )
)
case("scan_output_is_parameters", SQUARE, real(3, 4))(
    lambda p, x: lax.scan(lambda h, v: (h + v @ p["w"], p["w"] * 2), jnp.zeros(4), x)
)
case("scan_with_integer_carry", SQUARE, real(4, 4))(
    lambda p, x: lax.scan(
        lambda c, v: ((c[0] + 1, jnp.tanh(c[1] @ p["w"] + v * c[0])), None),
        (0, jnp.zeros(4)),
        x,
    )[0][1]
)

case("stack_scanned", STACK, Y)(stacked)
case("stack_scanned_vector", STACK, real(4))(stacked)
case("stack_scanned_reversed", STACK, Y)(lambda p, x: stacked(p, x, reverse=True))
case("stack_scanned_unrolled", STACK, Y)(lambda p, x: stacked(p, x, unroll=True))
case("stack_scanned_last_axis", {"w": weight(4, 4, 3)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.moveaxis(p["w"], -1, 0)
    )[0]
)
case("stack_scanned_scaled", STACK, Y)(
    lambda p, x: stacked(jax.tree.map(lambda v: 0.5 * v, p), x)
)
case("stack_scanned_built_by_stacking", {"a": SQUARE, "b": SQUARE}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["a"]["w"], p["b"]["w"]])
    )[0]
)
case("stack_and_constant_weight", STACK | {"u": weight(4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w) @ p["u"] + p["b"][0], None), x, p["w"]
    )[0]
)
case("stack_with_data_each_layer", STACK, (Y, real(3, 4)))(
    lambda p, x: lax.scan(
        lambda h, wv: (jnp.tanh(h @ wv[0] + wv[1]), None), x[0], (p["w"], x[1])
    )[0]
)
case("stack_also_used_whole", STACK, Y)(
    lambda p, x: (stacked(p, x), jnp.einsum("ti,lio->lto", x, p["w"]))
)
case("stack_nested_recurrence", {"w": weight(2, 4, 4), "u": weight(2, 4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, q: (recur({**q, "b": 0.0}, h), None), x, {"w": p["w"], "u": p["u"]}
    )[0]
)
case("stack_nested_stack", {"w": weight(2, 3, 4, 4), "c": weight(4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, ws: (
            lax.scan(lambda g, w: (jnp.tanh(g @ w @ p["c"]), None), h, ws)[0],
            None,
        ),
        x,
        p["w"],
    )[0]
)
case("stack_of_cells_in_time", {"w": weight(2, 4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, v: (
            lax.scan(lambda g, w: (jnp.tanh(g @ w), None), h + v, p["w"])[0],
            None,
        ),
        jnp.zeros(4),
        x,
    )[0]
)

case("remat_block", CELL, Y)(lambda p, x: jax.checkpoint(recur)(p, x))
case("remat_dense", STACK, Y)(lambda p, x: jax.checkpoint(stacked)(p, x))
case("remat_closure", SQUARE, Y)(
    lambda p, x: jax.checkpoint(lambda v: jnp.tanh(v @ p["w"]) @ p["w"])(x)
)
case("remat_inside_scan", STACK, Y)(
    lambda p, x: lax.scan(lambda h, q: (jax.checkpoint(residual)(q, h), None), x, p)[0]
)
case("remat_nested", SQUARE, Y)(
    lambda p, x: jax.checkpoint(
        lambda v: jax.checkpoint(lambda u: jnp.tanh(u @ p["w"]))(v) @ p["w"]
    )(x)
)
case("remat_with_a_policy", SQUARE, Y)(
    lambda p, x: jax.checkpoint(
        lambda w, v: jnp.sin(jnp.tanh(v @ w) @ w),
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )(p["w"], x)
)
case("remat_around_a_scan", LSTM, real(4, 4))(jax.checkpoint(lstm))
case("remat_of_parameters_only", SQUARE, Y)(
    lambda p, x: x @ jax.checkpoint(lambda w: jnp.tanh(w) @ w)(p["w"])
)
case("jit_nested", SQUARE, Y)(
    lambda p, x: jax.jit(lambda w, v: jax.jit(jnp.tanh)(v @ w) @ w)(p["w"], x)
)
case("jit_called_twice", SQUARE, Y)(
    lambda p, x: jitted_layer(p["w"], jitted_layer(p["w"], x))
)
case("jit_of_parameters_only", SQUARE, Y)(
    lambda p, x: x @ jax.jit(lambda w: w.T * 2)(p["w"])
)
case("jit_returns_both", SQUARE, Y)(
    lambda p, x: jax.jit(lambda w, v: (v @ w, w.T, jnp.sum(v), w[0]))(p["w"], x)
)

PAIR = {"a": weight(4, 4), "b": weight(4, 4), "c": weight(4)}
case("cond_by_data", PAIR, Y)(
    lambda p, x: lax.cond(
        jnp.sum(x) > 0, lambda: x @ p["a"], lambda: jnp.tanh(x @ p["b"]) + p["c"]
    )
)
case("cond_operands", PAIR, Y)(
    lambda p, x: lax.cond(
        x[0, 0] > 0,
        lambda p, x: jnp.tanh(x @ p["a"]),
        lambda p, x: x * p["c"],
        p,
        x,
    )
)
case("cond_one_branch_constant", PAIR, Y)(
    lambda p, x: (
        x + lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: jnp.zeros((3, 4)))
    )
)
case("cond_by_parameters", PAIR, Y)(
    lambda p, x: lax.cond(p["c"][0] > 0, lambda: x @ p["a"], lambda: x @ p["b"])
)
case("cond_same_weight_both", PAIR, Y)(
    lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x @ p["a"].T)
)
case("cond_chooses_a_weight", PAIR, Y)(
    lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["a"], lambda: 2 * p["b"])
)
case("cond_inside_scan", PAIR, real(4, 4))(
    lambda p, x: lax.scan(
        lambda h, v: (
            lax.cond(v[0] > 0, lambda: jnp.tanh(h @ p["a"] + v), lambda: h * p["c"]),
            None,
        ),
        jnp.ones(4),
        x,
    )[0]
)
case("cond_around_scan", CELL, real(4, 4))(
    lambda p, x: lax.cond(x[0, 0] > 0, lambda: recur(p, x), lambda: x @ p["w"])
)
case("switch_by_data", {"w": weight(3, 4, 4)}, (Y, ids(0, 3)))(
    lambda p, x: lax.switch(
        x[1],
        [
            lambda: x[0] @ p["w"][0],
            lambda: jnp.tanh(x[0] @ p["w"][1]),
            lambda: x[0] * p["w"][2, 0],
        ],
    )
)
case("switch_experts", {"g": weight(4, 3), "w": weight(3, 4, 4)}, real(4))(
    lambda p, x: (
        jax.nn.softmax(x @ p["g"])
        * jnp.sum(
            lax.switch(
                jnp.argmax(x @ p["g"]),
                [lambda v, i=i: v @ p["w"][i] for i in range(3)],
                x,
            )
        )
    )
)
case("fori_loop", SQUARE, Y)(
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + i), x)
)
case("fori_loop_layers", STACK, Y)(
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, h: h + jnp.tanh(h @ p["w"][i] + p["b"][i]), x
    )
)
case("while_loop_without_gradient", SQUARE, Y)(
    lambda p, x: x @ p["w"] * lax.stop_gradient(halvings(x @ p["w"]))
)
case("map_over_tokens", CELL, Y)(
    lambda p, x: lax.map(lambda v: jnp.tanh(v @ p["w"] + p["b"]) @ p["u"], x)
)
case("map_over_tokens_batched", SQUARE, real(6, 4))(
    lambda p, x: lax.map(lambda v: jnp.tanh(v @ p["w"]), x, batch_size=2)
)
case("map_over_weights", STACK, Y)(
    lambda p, x: lax.map(lambda q: jnp.tanh(x @ q["w"] + q["b"]), p)
)
case("vmap_over_tokens", CELL, Y)(
    lambda p, x: jax.vmap(lambda v: jnp.tanh(v @ p["w"] + p["b"]) @ p["u"])(x)
)
case("vmap_over_weights", STACK, Y)(
    lambda p, x: jax.vmap(lambda q: jnp.tanh(x @ q["w"] + q["b"]))(p)
)
case("vmap_over_both", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: jax.vmap(lambda w, v: jnp.tanh(v @ w))(p["w"], x)
)
case("associative_scan", {"a": weight(4), "w": weight(4, 4)}, real(5, 4))(
    lambda p, x: lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]),
        (jnp.broadcast_to(jax.nn.sigmoid(p["a"]), (5, 4)), x @ p["w"]),
    )[1]
)


# Custom derivatives.
@jax.custom_jvp
def clipped_identity(x: Any) -> Any:
    """The identity with a derivative of a half."""
    return x


@clipped_identity.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], 0.5 * tangents[0]


@jax.custom_vjp
def reversed_gradient(x: Any) -> Any:
    """The identity with gradient minus two."""
    return x * 1.0


reversed_gradient.defvjp(lambda x: (x * 1.0, None), lambda _, g: (-2.0 * g,))


@jax.custom_vjp
def own_dense(w: Any, x: Any) -> Any:
    """A matrix product whose gradient for the weight is three times the true one."""
    return x @ w


own_dense.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, g: (3.0 * r[1].T @ g, g @ r[0].T)
)


@jax.custom_vjp
def signed_weight(w: Any) -> Any:
    """Signs of a weight with the straight-through gradient."""
    return jnp.sign(w)


signed_weight.defvjp(lambda w: (jnp.sign(w), w), lambda w, g: (g * (abs(w) < 1),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_clipped(function: Any, w: Any, x: Any) -> Any:
    """A function whose gradients are clipped to one, entry by entry."""
    return function(w, x)


apply_clipped.defvjp(
    lambda f, w, x: (f(w, x), (w, x)),
    lambda f, r, g: tuple(jnp.clip(v, -1, 1) for v in jax.vjp(f, *r)[1](g)),
)


@jax.custom_jvp
def own_product(w: Any, x: Any) -> Any:
    """A product whose derivative for the weight is halved."""
    return w * x


@own_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return w * x, 0.5 * dw * x + w * dx


case("custom_jvp_of_data", SQUARE, Y)(
    lambda p, x: jnp.tanh(clipped_identity(x @ p["w"])) @ p["w"]
)
case("custom_jvp_of_parameters", SQUARE, Y)(lambda p, x: x @ clipped_identity(p["w"]))
case("custom_jvp_of_both", {"s": weight(4)}, Y)(lambda p, x: own_product(p["s"], x))
case("custom_vjp_of_data", SQUARE, Y)(
    lambda p, x: jnp.tanh(reversed_gradient(x @ p["w"])) @ p["w"]
)
case("custom_vjp_of_parameters", SQUARE, Y)(lambda p, x: x @ reversed_gradient(p["w"]))
case("custom_vjp_false_gradient", SQUARE, Y)(
    lambda p, x: own_dense(p["w"], jnp.tanh(x @ p["w"]))
)
case("custom_vjp_signs", SQUARE, Y)(lambda p, x: x @ signed_weight(p["w"]))
case("custom_vjp_clips_gradients", SQUARE, Y)(
    lambda p, x: apply_clipped(lambda w, v: jnp.sin(v @ w), p["w"], x)
)
case("custom_vjp_inside_scan", SQUARE, Y)(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh(own_dense(p["w"], (h + v)[None])[0]), None),
        jnp.zeros(4),
        x,
    )[0]
)
case("custom_vjp_inside_remat", SQUARE, Y)(
    lambda p, x: jax.checkpoint(lambda w, v: jnp.tanh(own_dense(w, v)) @ w)(p["w"], x)
)
case("custom_vjp_closes_over_parameters", SQUARE, Y)(
    lambda p, x: jax.checkpoint(lambda v: reversed_gradient(v @ p["w"]))(x)
)
case("custom_jvp_relu_at_zero", SQUARE | {"b": weight(4)}, ids(0, 2, 3, 4))(
    lambda p, x: jax.nn.relu(x * (x.T @ x)[0] * p["b"]) @ p["w"]
)
case("custom_root", {"w": weight(4)}, real(4))(
    lambda p, x: lax.custom_root(
        lambda y: y + 0.1 * p["w"] * jnp.tanh(y) - x,
        x,
        lambda f, y: lax.fori_loop(0, 20, lambda _, v: v - f(v), y),
        lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
    )
)

# Derivatives inside the loss.
NET = {"a": weight(4, 4), "b": weight(4)}
case("gradient_penalty", NET, real(4))(
    lambda p, x: jax.value_and_grad(lambda v: jnp.tanh(v @ p["a"]) @ p["b"])(x)
)
case("directional_derivative", NET, (real(4), real(4)))(
    lambda p, x: jax.jvp(lambda v: jnp.tanh(v @ p["a"]) * p["b"], (x[0],), (x[1],))
)
case("laplacian", NET, real(4))(
    lambda p, x: jnp.trace(jax.hessian(lambda v: jnp.tanh(v @ p["a"]) @ p["b"])(x))
)
case("inner_gradient_step", NET, (Y, real(3, 4)))(
    lambda p, x: (
        x[0]
        @ (p["a"] - 0.1 * jax.grad(lambda a: jnp.sum((x[1] @ a - 1) ** 2))(p["a"]))
        * p["b"]
    )
)

# Odd primitives.
case("odd_fft", SQUARE, real(8, 4))(
    lambda p, x: jnp.abs(jnp.fft.fft(x @ p["w"], axis=0)) ** 2
)
case("odd_rfft_between", {"a": weight(4, 4), "b": weight(4, 3)}, real(8, 4))(
    lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x @ p["a"], axis=0) ** 2, axis=0) @ p["b"]
)
case("odd_complex_weight_product", {"a": weight(4, 4), "b": weight(4, 4)}, Y)(
    lambda p, x: jnp.abs(jnp.exp(1j * x) @ (p["a"] + 1j * p["b"])) ** 2
)
case("odd_real_weight_complex_data", SQUARE, Y)(
    lambda p, x: jnp.real((jnp.exp(1j * x) @ p["w"]) ** 2)
)
case("odd_segment_sum", SQUARE, (real(5, 4), ids(0, 3, 5)))(
    lambda p, x: jnp.tanh(jax.ops.segment_sum(x[0] @ p["w"], x[1], 3)) @ p["w"]
)
case("odd_segment_max", SQUARE, (real(5, 4), ids(0, 2, 5)))(
    lambda p, x: jax.ops.segment_max(x[0] @ p["w"], x[1], 2)
)
case("odd_sort_data", SQUARE, Y)(lambda p, x: jnp.sort(x, axis=0) @ p["w"])
case("odd_sort_outputs", SQUARE, Y)(lambda p, x: jnp.sort(x @ p["w"], axis=0) @ p["w"])
case("odd_sort_with_a_parameter", {"w": weight(5)}, real(5))(
    lambda p, x: lax.sort((x, p["w"]), num_keys=1)
)
case("odd_top_k", SQUARE, Y)(lambda p, x: lax.top_k(x @ p["w"], 2)[0])
case("odd_argmax_gathers", SQUARE | {"e": weight(4, 3)}, Y)(
    lambda p, x: p["e"][jnp.argmax(x @ p["w"], -1)]
)
case("odd_cumulative", SQUARE, Y)(
    lambda p, x: [
        jnp.cumsum(x @ p["w"], 0),
        jnp.cumprod(x @ p["w"], 0),
        lax.cummax(x @ p["w"]),
    ]
)
case("odd_max_ties", {"w": weight(4, 1)}, ids(0, 2, 5, 4))(
    lambda p, x: jnp.max(x * 1.0 @ p["w"], 0)
)
case("odd_logsumexp", SQUARE, Y)(lambda p, x: jax.nn.logsumexp(x @ p["w"], 0))
case("odd_qr", SQUARE, real(5, 4))(lambda p, x: jnp.linalg.qr(x @ p["w"])[1] ** 2)
case("odd_determinant", SQUARE, real(4, 4))(
    lambda p, x: jnp.linalg.slogdet(x @ p["w"] + 3 * jnp.eye(4))[1]
)
case("odd_barrier", SQUARE, Y)(
    lambda p, x: (lambda w, v: jnp.tanh(v @ w) @ w)(
        *lax.optimization_barrier((p["w"], x))
    )
)
case("odd_named", SQUARE, Y)(lambda p, x: checkpoint_name(x @ p["w"], "y") ** 2)
case("odd_reduce_product", {"w": weight(4)}, Y)(lambda p, x: jnp.prod(x * p["w"], 1))
case("odd_rounding", SQUARE, Y)(
    lambda p, x: jnp.round(x @ p["w"]) * jnp.floor(x) + x @ p["w"]
)
case("odd_integer_power", SQUARE, Y)(lambda p, x: (x @ p["w"]) ** 3)
case("odd_erf_gamma", {"w": weight(4)}, Y)(
    lambda p, x: lax.erf(x * p["w"]) + lax.lgamma(1.5 + jnp.abs(x) + p["w"] ** 2)
)
case("odd_interpolation_table", {"w": weight(6)}, real(3))(
    lambda p, x: jnp.interp(x, np.linspace(-2, 2, 6), p["w"])
)
case("odd_cross_and_trace", {"w": weight(3)}, real(3))(
    lambda p, x: jnp.cross(x, p["w"]) * jnp.trace(jnp.outer(x, p["w"]))
)
case("odd_vectorized_norm", {"w": weight(4)}, Y)(
    lambda p, x: jnp.linalg.norm(x - p["w"], axis=-1)
)
case("odd_pairwise_distances", {"c": weight(3, 4)}, Y)(
    lambda p, x: jnp.sum((x[:, None] - p["c"][None]) ** 2, -1)
)
case("odd_gaussian_mixture", {"c": weight(3, 4), "s": weight(3)}, real(4))(
    lambda p, x: jax.nn.logsumexp(
        p["s"] - 0.5 * jnp.sum((x - p["c"]) ** 2, -1) * jnp.exp(p["s"])
    )
)

CHANNELS_LAST = ("NWC", "WIO", "NWC")


def halvings(y: Any) -> Any:
    """How often the sum must be halved to fall below one, by a true while loop."""
    start = (jnp.abs(jnp.sum(lax.stop_gradient(y))), 1.0)
    return lax.while_loop(lambda c: c[0] > 1, lambda c: (c[0] / 2, c[1] + 1), start)[1]
