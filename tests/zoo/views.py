"""Cases: views of a parameter in every kind of use, and sizes that change the path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo.core import BATCH, Case, Table, batch_of, floats, ids, real, weight

CASES = Table()
case = CASES.case
NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
IMAGE, TOKENS, Y = real(5, 6, 2), ids(0, 5, 4), real(3, 4)


def conv(x: Any, w: Any, **options: Any) -> Any:
    """A convolution of one image or sequence, channels last."""
    layout = NHWC if x.ndim == 3 else NWC
    defaults: dict[str, Any] = dict(window_strides=(1,) * (x.ndim - 1), padding="SAME")
    return lax.conv_general_dilated(
        x[None], w, dimension_numbers=layout, **(defaults | options)
    )[0]


# Kernels of convolutions.
case("view_conv_sliced_channels", {"w": weight(3, 3, 4, 5)}, IMAGE)(
    lambda p, x: conv(x, p["w"][:, :, 1:3, :4])
)
case("view_conv_sliced_window", {"w": weight(3, 3, 2, 4)}, IMAGE)(
    lambda p, x: conv(x, p["w"][1:, ::2])
)
case("view_conv_transposed", {"w": weight(4, 2, 3, 2)}, IMAGE)(
    lambda p, x: conv(x, jnp.transpose(p["w"], (2, 3, 1, 0)))
)
case("view_conv_from_a_matrix", {"w": weight(18, 4)}, IMAGE)(
    lambda p, x: conv(x, p["w"].reshape(3, 3, 2, 4))
)
case("view_conv_from_a_dense_layer", {"w": weight(2, 4)}, IMAGE)(
    lambda p, x: (conv(x, p["w"][None, None]), jnp.tanh(x) @ p["w"])
)
case("view_conv_in_and_out_swapped", {"w": weight(3, 3, 2, 2)}, IMAGE)(
    lambda p, x: conv(jnp.tanh(conv(x, p["w"])), jnp.swapaxes(p["w"], 2, 3))
)
case("view_conv_grouped_from_dense", {"w": weight(3, 3, 4)}, IMAGE)(
    lambda p, x: conv(x, p["w"].reshape(3, 3, 1, 4), feature_group_count=2)
)
case("view_conv_grouped_outputs_reshaped", {"w": weight(3, 3, 1, 2, 3)}, IMAGE)(
    lambda p, x: conv(x, p["w"].reshape(3, 3, 1, 6), feature_group_count=2)
)
case("view_conv_grouped_outputs_turned", {"w": weight(3, 3, 1, 3, 2)}, IMAGE)(
    lambda p, x: conv(
        x,
        jnp.swapaxes(p["w"], 3, 4).reshape(3, 3, 1, 6),
        feature_group_count=2,
    )
)
case("view_conv_scaled", {"w": weight(3, 3, 2, 4)}, IMAGE)(
    lambda p, x: conv(conv(x, -2.0 * p["w"]), 0.5 * jnp.ones((1, 1, 4, 2)))
)
case("view_conv_two_halves", {"w": weight(3, 3, 2, 4)}, IMAGE)(
    lambda p, x: (conv(x, p["w"][..., :2]), conv(jnp.tanh(x), p["w"][..., 2:]))
)
case("view_conv_of_a_stack", {"w": weight(3, 3, 2, 2)}, real(6, 2))(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(conv(h, w)), None), x, p["w"])[0]
)
case("view_conv_vmapped_over_kernels", {"w": weight(2, 3, 2, 3)}, real(6, 2))(
    lambda p, x: jax.vmap(lambda w: conv(x, w))(p["w"])
)
case("view_conv_vmapped_over_both", {"w": weight(2, 3, 2, 3)}, real(2, 6, 2))(
    lambda p, x: jax.vmap(conv)(x, p["w"])
)
case("view_conv_vmapped_over_images", {"w": weight(3, 2, 3)}, real(2, 6, 2))(
    lambda p, x: jax.vmap(conv, (0, None))(x, p["w"])
)
case("view_conv_gradient_inside", {"w": weight(3, 2, 3)}, real(6, 2))(
    lambda p, x: jax.grad(lambda v: jnp.sum(jnp.tanh(conv(v, p["w"])) ** 2))(x)
)
case("view_conv_gradient_strided", {"w": weight(3, 2, 3)}, real(7, 2))(
    lambda p, x: jax.grad(
        lambda v: jnp.sum(jnp.sin(conv(v, p["w"], window_strides=(2,))))
    )(x)
)
case("view_conv_tangent_inside", {"w": weight(3, 2, 3)}, (real(6, 2), real(6, 2)))(
    lambda p, x: jax.jvp(lambda v: jnp.tanh(conv(v, p["w"])), (x[0],), (x[1],))
)

# Rows of tables.
case("view_rows_of_a_transpose", {"e": weight(3, 5)}, TOKENS)(lambda p, t: p["e"].T[t])
case("view_rows_of_a_reshape", {"e": weight(10, 3)}, TOKENS)(
    lambda p, t: p["e"].reshape(5, 6)[t]
)
case("view_rows_of_a_flat_table", {"e": weight(15)}, TOKENS)(
    lambda p, t: p["e"].reshape(5, 3)[t]
)
case("view_rows_strided", {"e": weight(9, 3)}, TOKENS)(lambda p, t: p["e"][::2][t])
case("view_rows_reversed", {"e": weight(5, 3)}, TOKENS)(lambda p, t: p["e"][::-1][t])
case("view_rows_of_some_columns", {"e": weight(5, 6)}, TOKENS)(
    lambda p, t: (p["e"][:, 1:3][t], jnp.tanh(p["e"][:, 4:][t]))
)
case("view_rows_of_overlapping_columns", {"e": weight(5, 6)}, TOKENS)(
    lambda p, t: (p["e"][:, :4][t], jnp.tanh(p["e"][:, 2:][t]))
)
case("view_rows_of_two_halves", {"e": weight(10, 3)}, (TOKENS, TOKENS))(
    lambda p, t: (p["e"][:5][t[0]], jnp.tanh(p["e"][5:][t[1]]))
)
case("view_rows_of_overlapping_halves", {"e": weight(8, 3)}, (TOKENS, TOKENS))(
    lambda p, t: (p["e"][:5][t[0]], jnp.tanh(p["e"][3:][t[1]]))
)
case("view_rows_merged_axes", {"e": weight(2, 5, 3)}, ids(0, 10, 4))(
    lambda p, t: p["e"].reshape(10, 3)[t]
)
case("view_rows_merged_turned", {"e": weight(5, 2, 3)}, ids(0, 10, 4))(
    lambda p, t: jnp.swapaxes(p["e"], 0, 1).reshape(10, 3)[t]
)
case("view_rows_scaled_unlike", {"e": weight(5, 3)}, (TOKENS, TOKENS))(
    lambda p, t: (-2.0 * p["e"])[t[0]] * (0.5 * p["e"])[t[1]]
)
case("view_rows_and_columns", {"e": weight(5, 5)}, (TOKENS, TOKENS))(
    lambda p, t: (p["e"][t[0]], jnp.tanh(p["e"][:, t[1]]))
)
case("view_rows_all_the_same", {"e": weight(5, 3)}, ids(2, 3, 6))(
    lambda p, t: jnp.tanh(p["e"][t]) * jnp.arange(1.0, 7.0)[:, None]
)
case("view_rows_of_a_stack", {"e": weight(3, 5, 2)}, TOKENS)(
    lambda p, t: lax.scan(
        lambda h, e: (jnp.tanh(h + e[t].sum(0)), None), jnp.zeros(2), p["e"]
    )
)
case("view_rows_vmapped_tables", {"e": weight(3, 5, 2)}, ids(0, 5, 3, 4))(
    lambda p, t: jax.vmap(lambda e, i: e[i])(p["e"], t)
)
case("view_rows_vmapped_one_id_list", {"e": weight(3, 5, 2)}, TOKENS)(
    lambda p, t: jax.vmap(lambda e: e[t])(p["e"])
)
case("view_row_dynamic_of_transpose", {"e": weight(3, 5)}, ids(0, 5))(
    lambda p, t: lax.dynamic_index_in_dim(p["e"].T, t, keepdims=False)
)
case("view_row_dynamic_negative", {"e": weight(5, 3)}, ids(-7, 7))(
    lambda p, t: lax.dynamic_slice(p["e"], (t, 0), (1, 3))
)
case("view_entry_dynamic", {"e": weight(5, 3)}, (ids(-2, 7), ids(-2, 5)))(
    lambda p, t: lax.dynamic_slice(p["e"], t, (1, 1)) * (1.0 + t[0])
)
case("view_tied_by_a_slice", {"e": weight(7, 4)}, (TOKENS, real(4, 4)))(
    lambda p, t: (p["e"][t[0]], jnp.tanh(t[1]) @ p["e"][:5].T)
)
case("view_tied_with_a_dense_layer", {"e": weight(5, 5)}, TOKENS)(
    lambda p, t: jnp.tanh(p["e"][t] @ p["e"]) @ p["e"].T
)

# Stacks.
case("view_stack_reversed_view", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][::-1])[0]
)
case("view_stack_sliced", {"w": weight(4, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][1:3])[0]
)
case("view_stack_sliced_twice", {"w": weight(4, 4, 4)}, Y)(
    lambda p, x: (
        lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][:2])[0],
        lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, p["w"][2:])[0],
    )
)
case("view_stack_strided", {"w": weight(4, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][::2])[0]
)
case("view_stack_scanned_twice", {"w": weight(2, 4, 4)}, Y)(
    lambda p, x: [
        lax.scan(lambda h, w, f=f: (f(h @ w), None), x, p["w"])[0]
        for f in (jnp.tanh, jnp.sin)
    ]
)
case("view_stack_and_one_layer", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"][1], p["w"])
)
case("view_stack_of_transposes", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w.T), h @ w), x, p["w"])
)
case("view_stack_from_a_matrix", {"w": weight(12, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, p["w"].reshape(3, 4, 4)
    )[0]
)
case("view_stack_split_in_two", {"w": weight(4, 4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, ws: (
            lax.scan(lambda g, w: (jnp.tanh(g @ w), None), h, ws)[0],
            None,
        ),
        x,
        p["w"].reshape(2, 2, 4, 4),
    )[0]
)
case("view_stack_sliced_in_the_body", {"w": weight(2, 4, 6)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w[:, :4]), jnp.tanh(h) @ w[:, 4:]), x, p["w"]
    )
)
case("view_stack_batched_in_the_body", {"w": weight(2, 2, 4, 4)}, real(2, 3, 4))(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(jnp.einsum("hti,hio->hto", h, w)), None), x, p["w"]
    )[0]
)
case("view_stack_rows_by_data", {"w": weight(2, 5, 4)}, (Y, ids(0, 5, 3)))(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h + w[x[1]]), None), x[0], p["w"])[0]
)
case("view_stack_last_axis_turned", {"w": weight(4, 3, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.swapaxes(p["w"], 0, 1)
    )[0]
)
case("view_constant_in_nested_loops", {"w": weight(4, 4)}, real(2, 3, 4))(
    lambda p, x: lax.scan(
        lambda h, rows: (
            lax.scan(lambda g, v: (jnp.tanh(g @ p["w"] + v), None), h, rows)[0],
            None,
        ),
        jnp.zeros(4),
        x,
    )[0]
)
case("view_loop_and_outside", {"w": weight(4, 4)}, Y)(
    lambda p, x: (
        lax.scan(lambda h, v: (jnp.tanh(h @ p["w"] + v), None), jnp.ones(4), x)[0],
        x @ p["w"],
    )
)
case("view_slice_in_a_loop_and_outside", {"w": weight(4, 6)}, Y)(
    lambda p, x: (
        lax.scan(lambda h, v: (jnp.tanh(h @ p["w"][:, :4] + v), None), jnp.ones(4), x)[
            0
        ],
        x @ p["w"][:, 2:],
    )
)
case("view_loop_of_one_turn", {"w": weight(1, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
)
case("view_remat_of_a_slice", {"w": weight(4, 8)}, Y)(
    lambda p, x: jax.checkpoint(lambda v, w: jnp.tanh(v @ w) @ w.T)(x, p["w"][:, 2:6])
)

# Layouts of einsums and matrices.
case("view_einsum_merged_axes", {"w": weight(2, 3, 4)}, real(3, 6))(
    lambda p, x: x @ p["w"].reshape(6, 4)
)
case("view_einsum_split_axis", {"w": weight(6, 4)}, real(3, 2, 3))(
    lambda p, x: jnp.einsum("tab,abo->to", x, p["w"].reshape(2, 3, 4))
)
case("view_merged_unlike_a_split", {"w": weight(4, 4)}, (Y, real(3, 2, 4)))(
    lambda p, x: (
        x[0] @ p["w"],
        jnp.einsum("tab,abo->to", x[1], p["w"].reshape(2, 4, 2)),
    )
)
case("view_batch_axis_and_not", {"w": weight(2, 4, 4)}, (real(2, 3, 4), real(3, 8)))(
    lambda p, x: (
        jnp.einsum("hti,hio->hto", x[0], p["w"]),
        x[1] @ p["w"].reshape(8, 4),
    )
)
case("view_same_part_swapped", {"w": weight(4, 4)}, (Y, Y))(
    lambda p, x: (x[0] @ p["w"], jnp.tanh(x[1]) @ p["w"].T, p["w"] @ x[0].T)
)
case("view_quarters", {"w": weight(4, 4)}, real(3, 2))(
    lambda p, x: [
        jnp.tanh(x * (1 + a + 2 * b)) @ p["w"][2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
        for a in range(2)
        for b in range(2)
    ]
)
case("view_interleaved_columns", {"w": weight(4, 6)}, Y)(
    lambda p, x: (x @ p["w"][:, ::2], jnp.tanh(x) @ p["w"][:, 1::2])
)
case("view_cast_up_and_down", {"w": weight(4, 4)}, Y)(
    lambda p, x: x @ p["w"].astype(jnp.result_type(float)).astype(x.dtype)
)
case("view_vmapped_models", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w) @ w.T)(p["w"])
)

# Sizes that take the other path: Gram products or formed gradients.
case("wide_dense_sequence", {"w": weight(30, 20)}, real(3, 30))(lambda p, x: x @ p["w"])
case("wide_conv_few_outputs", {"w": weight(3, 3, 6, 8)}, real(4, 4, 6))(
    lambda p, x: conv(x, p["w"], padding="VALID")
)
case("wide_conv_grouped", {"w": weight(3, 3, 4, 8)}, real(4, 4, 8))(
    lambda p, x: conv(x, p["w"], padding="VALID", feature_group_count=2)
)
case("wide_conv_depthwise", {"w": weight(3, 3, 1, 12)}, real(4, 4, 12))(
    lambda p, x: conv(x, p["w"], padding="VALID", feature_group_count=12)
)
case("wide_conv_strided_dilated", {"w": weight(2, 3, 6, 10)}, real(5, 6, 6))(
    lambda p, x: conv(
        x, p["w"], padding="VALID", window_strides=(3, 2), rhs_dilation=(2, 1)
    )
)
case("wide_scan", {"w": weight(16, 16), "u": weight(10, 16)}, real(3, 10))(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh(h @ p["w"] + v @ p["u"]), None), jnp.ones(16), x
    )[0]
)
case("wide_stack", {"w": weight(2, 16, 16)}, real(2, 16))(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
)
case("wide_shared", {"w": weight(16, 16)}, real(2, 16))(
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
)
case("wide_shared_transposed", {"w": weight(16, 16)}, real(2, 16))(
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
)
case("wide_tied", {"e": weight(20, 12)}, ids(0, 20, 3))(
    lambda p, t: jnp.tanh(p["e"][t]) @ p["e"].T
)
case("wide_embedding_long", {"e": weight(4, 3)}, ids(0, 4, 30))(
    lambda p, t: jnp.tanh(p["e"][t]) * jnp.arange(30.0)[:, None]
)
case("wide_batched_weights", {"w": weight(3, 12, 14)}, real(3, 2, 12))(
    lambda p, x: jnp.einsum("hti,hio->hto", x, p["w"])
)
case("long_batched_weights", {"w": weight(3, 2, 3)}, real(3, 20, 2))(
    lambda p, x: jnp.einsum("hti,hio->hto", x, p["w"])
)
case("long_shared_transposed", {"w": weight(3, 3)}, real(20, 3))(
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
)
case("long_scan", {"w": weight(3, 3)}, real(20, 3))(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh(h @ p["w"] + v), None), jnp.ones(3), x
    )[0]
)
case("long_conv_grouped", {"w": weight(3, 2, 4)}, real(20, 4))(
    lambda p, x: conv(x, p["w"], feature_group_count=2)
)
case("long_slices_of_a_kernel", {"w": weight(3, 6)}, real(20, 3))(
    lambda p, x: (x @ p["w"][:, :2], jnp.tanh(x) @ p["w"][:, 2:])
)

# Nothing, one, and types.
case("none_of_the_tokens", {"w": weight(4, 3)}, Y)(lambda p, x: (x[:0] @ p["w"], x))
case("none_of_the_ids", {"e": weight(4, 3)}, (ids(0, 4, 3), Y))(
    lambda p, t: (p["e"][t[0][:0]], t[1])
)
case("none_of_the_turns", {"w": weight(4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, v: (h @ p["w"] + v, None), x[0], x[:0])[0]
)
case("none_of_the_outputs", {"w": weight(4, 3)}, Y)(lambda p, x: (x @ p["w"][:, :0], x))
case("none_of_a_leaf", {"w": weight(4, 0)}, Y)(lambda p, x: (x @ p["w"], x))
case("one_of_everything", {"w": weight(1, 1), "b": weight(1)}, real(1, 1))(
    lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
)


@CASES.build
def type_weak_scalar() -> Case:
    """A weakly typed scalar parameter, as ``jnp.asarray(2.0)`` makes."""
    params = {"s": jnp.asarray(2.0), "w": floats(np.ones((4, 3)))}

    def loss(p: Any, x: Any) -> Any:
        step = lambda h, v: (h * p["s"] + jnp.tanh(v @ p["w"]), None)  # noqa: E731
        return jnp.sum(lax.scan(step, jnp.zeros(3), x)[0] * p["s"])

    return Case(loss, params, batch_of(3, 4))


@CASES.build
def type_numpy_arrays() -> Case:
    """Parameters and batch as NumPy arrays."""
    params = {"w": np.asarray(floats(np.linspace(-1, 1, 12))).reshape(4, 3)}
    batch = np.asarray(batch_of(3, 4))
    return Case(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2), params, batch)


@CASES.build
def type_legacy_keys() -> Case:
    """Raw uint32 keys in the batch."""

    def loss(p: Any, example: Any) -> Any:
        raw, x = example
        mask = jax.random.bernoulli(jax.random.wrap_key_data(raw), 0.5, x.shape)
        return jnp.sum(jnp.tanh((x * mask) @ p["w"]))

    raw = jax.random.key_data(jax.random.split(jax.random.key(0), BATCH))
    return Case(loss, {"w": floats(np.ones((4, 3)))}, (raw, batch_of(3, 4)))


@CASES.build
def type_bytes_and_flags() -> Case:
    """A batch of uint8 images and bool flags."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (BATCH, 3, 4)), jnp.uint8)
    flags = jnp.asarray(rng.random(BATCH) < 0.5)

    def loss(p: Any, example: Any) -> Any:
        image, flag = example
        y = jnp.tanh(image.astype(p["w"].dtype) / 255 @ p["w"])
        return jnp.sum(jnp.where(flag, y, -2 * y))

    params = {"w": floats(np.linspace(-1, 1, 8).reshape(4, 2))}
    return Case(loss, params, (images, flags))


@CASES.build
def type_bf16_loss() -> Case:
    """A loss that comes out in bfloat16."""

    def loss(p: Any, x: Any, dtype: Any = jnp.bfloat16) -> Any:
        return jnp.mean(jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype)))

    def exact(p: Any, x: Any) -> Any:
        return loss(p, x, jnp.float64)

    params = {"w": floats(np.linspace(-1, 1, 8).reshape(4, 2))}
    return Case(loss, params, batch_of(3, 4), exact)
