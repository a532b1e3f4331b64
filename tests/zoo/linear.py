"""Cases: dense layers, einsums, convolutions and embeddings of every kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.core import Table, ids, real, weight

CASES = Table()
case = CASES.case


def dense(p: Any, x: Any) -> Any:
    """An affine map of the last axis."""
    return x @ p["w"] + p["b"]


W, B = weight(5, 4), weight(4)
case("dense_vector", {"w": W, "b": B}, real(5))(dense)
case("dense_sequence", {"w": W, "b": B}, real(3, 5))(dense)
case("dense_rank3", {"w": W, "b": B}, real(2, 3, 5))(dense)
case("dense_rank4", {"w": W, "b": B}, real(2, 1, 3, 5))(dense)
case("dense_left", {"w": weight(4, 5)}, real(5))(lambda p, x: p["w"] @ x)
case("dense_left_matrix", {"w": weight(4, 5)}, real(5, 3))(lambda p, x: p["w"] @ x)
case("dense_long_sequence", {"w": weight(2, 3)}, real(40, 2))(lambda p, x: x @ p["w"])
case("dense_one_output", {"w": weight(5)}, real(3, 5))(lambda p, x: x @ p["w"])
case("dense_inner_product", {"w": weight(5)}, real(5))(lambda p, x: x @ p["w"])
case("dense_size_one_axes", {"w": weight(1, 1)}, real(1))(lambda p, x: x @ p["w"])
case("dense_high_precision", {"w": W}, real(3, 5))(
    lambda p, x: jnp.dot(x, p["w"], precision="highest")
)
case("dense_no_contraction", {"w": weight(2, 3)}, real(4))(
    lambda p, x: jnp.tensordot(x, p["w"], 0)
)
case("dense_two_contractions", {"w": weight(2, 4, 5)}, real(3, 4, 2))(
    lambda p, x: jnp.tensordot(x, p["w"], ((1, 2), (1, 0)))
)
case("dense_full_contraction", {"w": weight(3, 4)}, real(3, 4))(
    lambda p, x: jnp.tensordot(x, p["w"], 2)
)
case("dense_bilinear", {"w": weight(4, 4)}, real(4))(lambda p, x: x @ p["w"] @ x)
case("dense_gram_of_outputs", {"w": weight(4, 3)}, real(3, 4))(
    lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T
)
case("dense_relu_at_zero", {"a": W, "c": weight(4, 2)}, ids(0, 2, 3, 5))(
    lambda p, x: jax.nn.relu((x.at[1].set(0) * 1.0) @ p["a"]) @ p["c"]
)
case("dense_three_layers", {"a": W, "b": weight(4, 6), "c": weight(6, 2)}, real(3, 5))(
    lambda p, x: jax.nn.gelu(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
)
case("dense_output_masked", {"w": W}, (real(3, 5), ids(0, 2, 3)))(
    lambda p, x: jnp.where(x[1][:, None] > 0, x[0] @ p["w"], 0)
)
case("dense_of_integers", {"w": W}, ids(0, 5, 3, 5))(
    lambda p, x: x.astype(p["w"].dtype) @ p["w"]
)
case("dense_of_a_constant", {"w": W, "v": weight(5, 4)}, real(3, 5))(
    lambda p, x: x @ p["v"] + jnp.ones(5) @ p["w"]
)

EINSUMS = {
    "ti,io->to": ((3, 4), (4, 5)),
    "ti,oi->to": ((3, 4), (5, 4)),
    "ti,oi->ot": ((3, 4), (5, 4)),
    "ti,hio->tho": ((3, 4), (2, 4, 5)),
    "ti,hio->hto": ((3, 4), (2, 4, 5)),
    "hti,hio->hto": ((2, 3, 4), (2, 4, 5)),
    "hti,hio->to": ((2, 3, 4), (2, 4, 5)),
    "thd,hdo->to": ((3, 2, 4), (2, 4, 5)),
    "thd,ohd->to": ((3, 2, 4), (5, 2, 4)),
    "ti,to->tio": ((3, 4), (3, 5)),
    "ti,ti->t": ((3, 4), (3, 4)),
    "ti,i->ti": ((3, 4), (4,)),
    "ti,t->ti": ((3, 4), (3,)),
    "tij,ij->t": ((3, 4, 5), (4, 5)),
    "i,o->io": ((4,), (5,)),
    "ghti,hio->ghto": ((2, 3, 4, 2), (3, 2, 5)),
    "htgi,ghio->thgo": ((2, 3, 2, 4), (2, 2, 4, 3)),
    "ti,ii->t": ((3, 4), (4, 4)),
    "ti,io->o": ((3, 4), (4, 5)),
    "ti,jo->to": ((3, 4), (2, 5)),
}
for _equation, (_x, _w) in EINSUMS.items():
    case(f"einsum {_equation}", {"w": weight(*_w)}, real(*_x))(
        lambda p, x, equation=_equation: jnp.einsum(equation, x, p["w"])
    )
case("einsum weight_first io,ti->to", {"w": weight(4, 5)}, real(3, 4))(
    lambda p, x: jnp.einsum("io,ti->to", p["w"], x)
)
case("einsum batched_weight_first", {"w": weight(2, 4, 5)}, real(2, 3, 4))(
    lambda p, x: jnp.einsum("hio,hti->oht", p["w"], x)
)
case("einsum chain ij,jk,tk->ti", {"a": W, "b": weight(4, 3)}, real(2, 3))(
    lambda p, x: jnp.einsum("ij,jk,tk->ti", p["a"], p["b"], x)
)
case("einsum two_data ti,tj,ijo->to", {"w": weight(3, 4, 2)}, (real(2, 3), real(2, 4)))(
    lambda p, x: jnp.einsum("ti,tj,ijo->to", x[0], x[1], p["w"])
)

NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
CONVS: dict[str, tuple] = {
    "1d": ((8, 3), (3, 3, 4), NWC, dict(window_strides=(1,), padding="SAME")),
    "1d_causal": ((6, 2), (3, 2, 3), NWC, dict(window_strides=(1,), padding=[(2, 0)])),
    "2d": ((5, 6, 3), (3, 2, 3, 4), NHWC, {}),
    "3d": ((4, 5, 3, 2), (2, 3, 2, 2, 3), ("NHWDC", "HWDIO", "NHWDC"), {}),
    "strided": ((7, 8, 3), (3, 2, 3, 4), NHWC, dict(window_strides=(2, 3))),
    "strided_same": (
        (7, 8, 2),
        (3, 3, 2, 3),
        NHWC,
        dict(window_strides=(2, 2), padding="SAME"),
    ),
    "stride_skips_pixels": ((8, 8, 2), (2, 2, 2, 3), NHWC, dict(window_strides=(3, 3))),
    "kernel_dilated": ((7, 7, 2), (2, 3, 2, 3), NHWC, dict(rhs_dilation=(3, 2))),
    "input_dilated": (
        (4, 3, 2),
        (3, 2, 2, 3),
        NHWC,
        dict(lhs_dilation=(2, 3), padding=((1, 1), (0, 2))),
    ),
    "grouped": ((5, 5, 4), (3, 3, 2, 6), NHWC, dict(feature_group_count=2)),
    "depthwise": ((5, 5, 4), (3, 3, 1, 4), NHWC, dict(feature_group_count=4)),
    "depthwise_1d": ((6, 3), (4, 1, 3), NWC, dict(feature_group_count=3)),
    "depthwise_multiplier": (
        (5, 5, 3),
        (3, 3, 1, 6),
        NHWC,
        dict(feature_group_count=3, padding="SAME"),
    ),
    "nchw": ((3, 6, 5), (4, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {}),
    "nchw_grouped_strided": (
        (4, 6, 5),
        (6, 2, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        dict(feature_group_count=2, window_strides=(2, 1)),
    ),
    "odd_layouts": ((5, 3, 6), (3, 4, 2, 3), ("NHCW", "IOHW", "CWNH"), {}),
    "explicit_padding": (
        (5, 6, 2),
        (3, 3, 2, 3),
        NHWC,
        dict(padding=((0, 2), (3, 1))),
    ),
    "negative_padding": (
        (6, 6, 2),
        (3, 2, 2, 3),
        NHWC,
        dict(padding=((-1, 2), (1, -2))),
    ),
    "1x1": ((4, 3, 5), (1, 1, 5, 2), NHWC, {}),
    "1x1_strided": ((5, 4, 3), (1, 1, 3, 2), NHWC, dict(window_strides=(2, 2))),
    "kernel_covers_input": ((3, 4, 2), (3, 4, 2, 5), NHWC, {}),
    "kernel_exceeds_input": ((3, 3, 2), (5, 5, 2, 3), NHWC, dict(padding="SAME")),
    "everything": (
        (5, 6, 4),
        (3, 2, 2, 6),
        NHWC,
        dict(
            window_strides=(2, 1),
            padding=((1, 3), (-1, 2)),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 3),
            feature_group_count=2,
        ),
    ),
}


def convolve(p: Any, x: Any, layout: tuple, options: dict) -> Any:
    """A convolution of one example, which has no batch axis of its own."""
    defaults: dict[str, Any] = dict(window_strides=(1,) * (x.ndim - 1), padding="VALID")
    return lax.conv_general_dilated(
        x[None], p["w"], dimension_numbers=layout, **(defaults | options)
    )


for _name, (_x, _w, _layout, _options) in CONVS.items():
    case(f"conv_{_name}", {"w": weight(*_w)}, real(*_x))(
        lambda p, x, layout=_layout, options=_options: convolve(p, x, layout, options)
    )

KERNEL, IMAGE = weight(3, 3, 2, 4), real(5, 6, 2)
SAME = dict(window_strides=(1, 1), padding="SAME")
case("conv_bias", {"w": KERNEL, "b": weight(4)}, IMAGE)(
    lambda p, x: convolve(p, x, NHWC, SAME) + p["b"]
)
case("conv_two_images_an_example", {"w": KERNEL}, real(2, 5, 4, 2))(
    lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC
    )
)
case("conv_batch_groups", {"w": weight(2, 2, 3, 4)}, real(4, 4, 5, 3))(
    lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "VALID", dimension_numbers=NHWC, batch_group_count=2
    )
)
case("conv_transposed", {"w": KERNEL}, real(3, 4, 2))(
    lambda p, x: lax.conv_transpose(
        x[None], p["w"], (2, 2), "SAME", dimension_numbers=NHWC
    )
)
case("conv_transposed_kernel", {"w": weight(3, 2, 4, 2)}, real(3, 4, 2))(
    lambda p, x: lax.conv_transpose(
        x[None],
        p["w"],
        (2, 3),
        "VALID",
        dimension_numbers=NHWC,
        transpose_kernel=True,
    )
)
case("conv_flipped_kernel", {"w": KERNEL}, IMAGE)(
    lambda p, x: convolve({"w": jnp.flip(p["w"], (0, 1))}, x, NHWC, SAME)
)
case("conv_standardised_kernel", {"w": KERNEL}, IMAGE)(
    lambda p, x: convolve(
        {"w": (p["w"] - p["w"].mean((0, 1, 2))) / (p["w"].std((0, 1, 2)) + 0.1)},
        x,
        NHWC,
        SAME,
    )
)
case("conv_shared_unlike_strides", {"w": weight(2, 2, 2, 2)}, IMAGE)(
    lambda p, x: (
        convolve(p, jnp.tanh(convolve(p, x, NHWC, SAME))[0], NHWC, {}),
        convolve(p, x, NHWC, dict(window_strides=(2, 2))),
    )
)
case("conv_kernel_also_dense", {"w": weight(1, 2, 3, 3)}, real(4, 4, 3))(
    lambda p, x: convolve(p, x, NHWC, SAME)[0] @ p["w"].reshape(6, 3)[:3]
)
case("conv_parameter_is_the_image", {"image": weight(1, 5, 5, 2)}, real(2, 2, 2, 3))(
    lambda p, x: lax.conv_general_dilated(
        p["image"], x, (1, 1), "VALID", dimension_numbers=NHWC
    )
)
case("conv_then_max_pool_ties", {"w": KERNEL}, ids(0, 2, 4, 4, 2))(
    lambda p, x: lax.reduce_window(
        jax.nn.relu(convolve(p, x.astype(p["w"].dtype), NHWC, SAME)),
        -jnp.inf,
        lax.max,
        (1, 2, 2, 1),
        (1, 2, 2, 1),
        "VALID",
    )
)
case("conv_by_patches", {"w": weight(18, 4)}, IMAGE)(
    lambda p, x: (
        lax.conv_general_dilated_patches(
            x[None], (3, 3), (1, 1), "VALID", dimension_numbers=NHWC
        )
        @ p["w"]
    )
)
case("conv_untied", {"w": weight(4, 5, 8, 3)}, IMAGE)(
    lambda p, x: lax.conv_general_dilated_local(
        x[None], p["w"], (1, 1), "VALID", (2, 2), dimension_numbers=NHWC
    )
)
case("conv_numpy_convolve", {"w": weight(3)}, real(7))(
    lambda p, x: jnp.convolve(x, p["w"], mode="full")
)

E, TOKENS = weight(7, 3), ids(0, 7, 4)
case("embedding_index", {"e": E}, TOKENS)(lambda p, t: p["e"][t])
case("embedding_take", {"e": E}, TOKENS)(lambda p, t: jnp.take(p["e"], t, axis=0))
case("embedding_repeated_ids", {"e": E}, ids(2, 4, 6))(lambda p, t: p["e"][t])
case("embedding_negative_ids", {"e": E}, ids(-7, 7, 5))(lambda p, t: p["e"][t])
case("embedding_out_of_range", {"e": E}, ids(-9, 10, 6))(lambda p, t: p["e"][t])
case("embedding_clip", {"e": E}, ids(-9, 10, 6))(
    lambda p, t: jnp.take(p["e"], t, axis=0, mode="clip")
)
case("embedding_wrap", {"e": E}, ids(-9, 10, 6))(
    lambda p, t: jnp.take(p["e"], t, axis=0, mode="wrap")
)
case("embedding_fill", {"e": E}, ids(-9, 10, 6))(
    lambda p, t: jnp.take(p["e"], t, axis=0, mode="fill", fill_value=0.5)
)
case("embedding_drop", {"e": E}, ids(-9, 10, 6))(
    lambda p, t: p["e"].at[t].get(mode="fill", fill_value=0)
)
case("embedding_unsigned_ids", {"e": E}, TOKENS)(lambda p, t: p["e"][t.astype("uint8")])
case("embedding_promised_in_bounds", {"e": E}, TOKENS)(
    lambda p, t: p["e"].at[t].get(mode="promise_in_bounds")
)
case("embedding_scalar_id", {"e": E}, ids(0, 7))(lambda p, t: p["e"][t])
case("embedding_scalar_dynamic", {"e": E}, ids(-1, 9))(
    lambda p, t: lax.dynamic_index_in_dim(p["e"], t, keepdims=False)
)
case("embedding_rank2_ids", {"e": E}, ids(0, 7, 2, 3))(lambda p, t: p["e"][t])
case("embedding_rank3_table", {"e": weight(5, 2, 3)}, ids(0, 5, 3))(
    lambda p, t: p["e"][t]
)
case("embedding_vector_table", {"e": weight(7)}, TOKENS)(lambda p, t: p["e"][t])
case("embedding_two_indices", {"e": weight(4, 5)}, (ids(0, 4, 6), ids(0, 5, 6)))(
    lambda p, t: p["e"][t[0], t[1]]
)
case("embedding_columns", {"e": weight(3, 7)}, TOKENS)(
    lambda p, t: jnp.take(p["e"], t, axis=1)
)
case("embedding_middle_axis", {"e": weight(2, 7, 3)}, TOKENS)(
    lambda p, t: jnp.take(p["e"], t, axis=1)
)
case("embedding_along_axis", {"e": weight(3, 7)}, ids(0, 7, 3, 2))(
    lambda p, t: jnp.take_along_axis(p["e"], t, axis=1)
)
case("embedding_sliced_rows", {"e": weight(7, 4)}, TOKENS)(lambda p, t: p["e"][t, 1:3])
case("embedding_of_half_the_table", {"e": weight(9, 3)}, TOKENS)(
    lambda p, t: p["e"][:7][t]
)
case("embedding_scaled", {"e": E}, TOKENS)(lambda p, t: p["e"][t] * 3**0.5)
# One example's terms cancel to a thirteenth; its norm is rounded up for that, by 1e-5.
case("embedding_bag", {"e": E}, (TOKENS, real(4)), excess=2e-5)(
    lambda p, t: jnp.sum(p["e"][t[0]] * t[1][:, None], 0)
)
case("embedding_segments", {"e": E}, (TOKENS, ids(0, 3, 4)))(
    lambda p, t: jax.ops.segment_sum(p["e"][t[0]], t[1], 3)
)
case("embedding_one_hot", {"e": E}, TOKENS)(lambda p, t: jax.nn.one_hot(t, 7) @ p["e"])
case("embedding_positions", {"e": E, "p": weight(6, 3)}, TOKENS)(
    lambda p, t: jnp.tanh(p["e"][t] + p["p"][:4])
)
case("embedding_two_lookups", {"e": E}, (TOKENS, ids(0, 7, 2)))(
    lambda p, t: (p["e"][t[0]], jnp.tanh(p["e"][t[1]]))
)
case("embedding_transformed_table", {"e": E}, TOKENS)(lambda p, t: jnp.tanh(p["e"])[t])
case("embedding_projected_table", {"e": E, "w": weight(3, 4)}, TOKENS)(
    lambda p, t: (p["e"] @ p["w"])[t]
)
case("embedding_scattered_into", {"e": E}, (TOKENS, real(4, 3)))(
    lambda p, t: p["e"].at[t[0]].add(t[1])
)
case("embedding_scatter_overwrites", {"e": E}, (ids(0, 7), real(3)))(
    lambda p, t: p["e"].at[t[0]].set(t[1])
)
case("embedding_is_the_update", {"e": weight(4, 3)}, (TOKENS, real(7, 3)))(
    lambda p, t: t[1].at[t[0]].add(p["e"])
)
case("tied_transposed", {"e": E}, TOKENS)(lambda p, t: jnp.tanh(p["e"][t]) @ p["e"].T)
case("tied_einsum", {"e": E}, TOKENS)(
    lambda p, t: jnp.einsum("td,vd->tv", jnp.tanh(p["e"][t]), p["e"])
)
case("tied_contracting", {"e": E}, TOKENS)(
    lambda p, t: lax.dot_general(jnp.sin(p["e"][t]), p["e"], (((1,), (1,)), ((), ())))
)
case("tied_scaled_unlike", {"e": E}, TOKENS)(
    lambda p, t: (jnp.tanh(p["e"][t] * 2.0) @ p["e"].T) / 3.0
)
case("tied_with_loss", {"e": E, "w": weight(3, 3)}, (TOKENS, ids(0, 7, 4)))(
    lambda p, t: (
        -jnp.take_along_axis(
            jax.nn.log_softmax(jnp.tanh(p["e"][t[0]] @ p["w"]) @ p["e"].T),
            t[1][:, None],
            axis=1,
        )
    )
)
case("tied_once_scaled", {"e": E, "g": weight()}, TOKENS)(
    lambda p, t: jnp.tanh(p["e"][t]) @ (p["g"] * p["e"]).T
)
