"""Cases: what may happen to a parameter on the way to its uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo.core import Table, bfloat16, ids, key, real, weight

CASES = Table()
case = CASES.case
W, X = {"w": weight(5, 4)}, real(3, 5)
SQUARE, Y = {"w": weight(4, 4)}, real(3, 4)

# Slices and layouts.
case("slice_rows", W, real(3, 2))(lambda p, x: x @ p["w"][:2])
case("slice_both_axes", W, real(3, 4))(lambda p, x: x @ p["w"][1:, :3])
case("slice_row", W, real(4))(lambda p, x: x * p["w"][0])
case("slice_matrix", {"w": weight(3, 4, 2)}, real(5, 4))(lambda p, x: x @ p["w"][1])
case("slice_strided", W, real(3, 3))(lambda p, x: x @ p["w"][::2])
case("slice_reversed", W, X)(lambda p, x: x @ p["w"][::-1])
case("slice_negative", W, real(3, 2))(lambda p, x: x @ p["w"][-2:])
case("slice_of_transpose", W, real(3, 3))(lambda p, x: x @ p["w"].T[1:])
case("slices_disjoint", W, X)(
    lambda p, x: jnp.tanh(x[:, :2] @ p["w"][:2]) + x[:, 2:] @ p["w"][2:]
)
case("slices_overlap", W, X)(
    lambda p, x: jnp.tanh(x[:, :3] @ p["w"][:3]) + x[:, 2:] @ p["w"][2:]
)
case("slice_and_whole", W, X)(
    lambda p, x: (x @ p["w"], jnp.tanh(x[:, :2]) @ p["w"][:2])
)
case("slice_columns_of_three", {"w": weight(4, 9)}, Y)(
    lambda p, x: [jnp.tanh(x * (i + 1)) @ v for i, v in enumerate(thirds(p["w"]))]
)
case("slice_all_of_three_one_input", {"w": weight(4, 9)}, Y)(
    lambda p, x: [jnp.tanh(y) for y in jnp.split(x @ p["w"], 3, axis=1)]
)
case("slice_dynamic_static_start", W, real(3, 2))(
    lambda p, x: x @ lax.dynamic_slice_in_dim(p["w"], 1, 2)
)
case("slice_dynamic_by_data", W, (real(3, 2), ids(0, 4)))(
    lambda p, x: x[0] @ lax.dynamic_slice_in_dim(p["w"], x[1], 2)
)
case("slice_dynamic_clamped", W, (real(3, 2), ids(-3, 9)))(
    lambda p, x: x[0] @ lax.dynamic_slice(p["w"], (x[1], 1), (2, 3))
)
case("slice_matrix_by_data", {"w": weight(3, 4, 2)}, (real(5, 4), ids(0, 3)))(
    lambda p, x: x[0] @ p["w"][x[1]]
)
case("slice_matrices_by_data", {"w": weight(3, 4, 2)}, (real(5, 4), ids(0, 3, 5)))(
    lambda p, x: jnp.einsum("ti,tio->to", x[0], p["w"][x[1]])
)
case("rows_permuted", W, X)(lambda p, x: x @ p["w"][np.array([3, 1, 0, 4, 2])])
case("rows_repeated", W, X)(lambda p, x: x @ p["w"][np.array([3, 1, 1, 4, 1])])
case("reshaped", {"w": weight(2, 10)}, X)(lambda p, x: x @ p["w"].reshape(5, 4))
case("reshaped_from_vector", {"w": weight(20)}, X)(
    lambda p, x: x @ p["w"].reshape(5, 4)
)
case("reshaped_to_heads", {"w": weight(4, 6)}, Y)(
    lambda p, x: jnp.einsum("ti,ihd->htd", x, p["w"].reshape(4, 2, 3))
)
case("reshaped_transposed_reshaped", {"w": weight(4, 6)}, Y)(
    lambda p, x: x @ p["w"].reshape(4, 2, 3).transpose(1, 0, 2).reshape(8, 3)[::2]
)
case("transposed", {"w": weight(4, 5)}, X)(lambda p, x: x @ p["w"].T)
case("transposed_rank3", {"w": weight(4, 2, 5)}, X)(
    lambda p, x: jnp.tensordot(x, p["w"].transpose(2, 0, 1), 1)
)
case("expanded", W, X)(lambda p, x: jnp.matmul(x[None], p["w"][None]))
case("squeezed", {"w": weight(1, 5, 1, 4)}, X)(lambda p, x: x @ jnp.squeeze(p["w"]))
case("padded", W, real(3, 8))(lambda p, x: x @ jnp.pad(p["w"], ((1, 2), (0, 1))))
case("rolled", W, X)(lambda p, x: x @ jnp.roll(p["w"], 2, 0))
case("repeated", W, real(3, 10))(lambda p, x: x @ jnp.repeat(p["w"], 2, axis=0))
case("tiled", W, real(3, 10))(lambda p, x: x @ jnp.tile(p["w"], (2, 1)))
case("broadcast_to_a_batch", W, real(2, 3, 5))(
    lambda p, x: jnp.einsum("hti,hio->hto", x, jnp.broadcast_to(p["w"], (2, 5, 4)))
)
case("concatenated", {"v": weight(2, 4), "w": weight(3, 4)}, X)(
    lambda p, x: x @ jnp.concatenate([p["v"], p["w"]])
)
case("concatenated_outputs", {"v": weight(5, 2), "w": weight(5, 3)}, X)(
    lambda p, x: x @ jnp.concatenate([p["v"], p["w"]], 1)
)
case("concatenated_with_data", {"v": weight(4)}, Y)(
    lambda p, x: jnp.concatenate([p["v"][None], x]) ** 2
)
case("concatenated_with_ones", W, real(3, 4))(
    lambda p, x: jnp.concatenate([x, jnp.ones((3, 1))], 1) @ p["w"]
)
case("stacked", {"v": weight(4), "w": weight(4)}, Y)(
    lambda p, x: x @ jnp.stack([p["v"], p["w"]], 1)
)
case("stacked_with_itself", W, real(2, 3, 5))(
    lambda p, x: jnp.einsum("hti,hio->hto", x, jnp.stack([p["w"], p["w"]]))
)
case("diagonal_only", SQUARE, Y)(lambda p, x: x @ jnp.diag(jnp.diag(p["w"])))
case("lower_triangle", SQUARE, Y)(lambda p, x: x @ jnp.tril(p["w"]))
case("masked_by_a_constant", W, X)(lambda p, x: x @ (p["w"] * (np.eye(5, 4) > 0)))
case("masked_by_where", W, X)(lambda p, x: x @ jnp.where(np.eye(5, 4) > 0, p["w"], 1.0))
case("kron", {"a": weight(2, 2), "b": weight(2, 3)}, Y)(
    lambda p, x: x @ jnp.kron(p["a"], p["b"])
)

# Scalar factors, signs, casts.
case("scaled", W, X)(lambda p, x: x @ (p["w"] * 0.3))
case("scaled_twice_and_divided", W, X)(lambda p, x: x @ (2.0 * (p["w"] * 0.3) / 7.0))
case("scaled_by_zero", W, X)(lambda p, x: x @ (p["w"] * 0.0) + jnp.sum(x))
case("scaled_by_a_constant_array", W, X)(
    lambda p, x: x @ (p["w"] * np.float32(0.25) * jnp.float32(3))
)
case("negated", W, X)(lambda p, x: x @ -p["w"])
case("negated_and_plain", W, X)(lambda p, x: (x @ -p["w"], jnp.tanh(x) @ p["w"]))
case("cancelling_uses", W, X)(lambda p, x: x @ p["w"] - 0.5 * (x @ p["w"]))
case("difference_of_uses", W, (X, X))(lambda p, x: (x[0] @ p["w"]) - (x[1] @ p["w"]))
case("scaled_by_a_parameter", W | {"g": weight()}, X)(
    lambda p, x: x @ (p["g"] * p["w"])
)
case("scaled_by_data", W, X)(lambda p, x: x @ (x[0, 0] * p["w"]))
case("scaled_by_columns", W | {"g": weight(4)}, X)(lambda p, x: x @ (p["g"] * p["w"]))
case("scaled_by_a_learnt_norm", W, X)(lambda p, x: x @ (p["w"] * jnp.sum(p["w"])))
case("stop_gradient_in_one_use", W, X)(
    lambda p, x: x @ p["w"] + jnp.tanh(x) @ lax.stop_gradient(p["w"])
)
case("stop_gradient_straight_through", W, X)(
    lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"]))
)
case("added_to_a_constant", W, X)(lambda p, x: x @ (p["w"] + 1.0))
case("added_to_a_frozen_weight", W, X)(
    lambda p, x: x @ (p["w"] + np.ones((5, 4), np.float32))
)
case("sum_of_two", {"v": weight(5, 4), "w": weight(5, 4)}, X)(
    lambda p, x: x @ (p["v"] + p["w"])
)
case("interpolated", {"v": weight(5, 4), "w": weight(5, 4)}, (X, real()))(
    lambda p, x: x[0] @ (x[1] * p["v"] + (1 - x[1]) * p["w"])
)

# Nonlinear functions of parameters.
case("weight_norm", W | {"g": weight(4)}, X)(
    lambda p, x: x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))
)
case("spectral_scaling", W, X)(lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])))
case("spectral_power_iteration", W, X)(lambda p, x: x @ (p["w"] / top_value(p["w"])))
case("lora", {"a": weight(5, 2), "b": weight(2, 4)}, X)(
    lambda p, x: x @ (np.full((5, 4), 0.1, np.float32) + p["a"] @ p["b"])
)
case("lora_in_two_steps", {"a": weight(5, 2), "b": weight(2, 4)}, X)(
    lambda p, x: x @ np.full((5, 4), 0.1, np.float32) + (x @ p["a"]) @ p["b"]
)
case("lora_scaled", W | {"a": weight(5, 2), "b": weight(2, 4)}, X)(
    lambda p, x: x @ (p["w"] + 0.5 * (p["a"] @ p["b"]))
)
case("softplus_weight", W, X)(lambda p, x: x @ jax.nn.softplus(p["w"]))
case("softplus_scale", {"w": weight(5)}, X)(lambda p, x: jax.nn.softplus(p["w"]) * x)
case("maximum_weight", W, X)(lambda p, x: x @ jnp.maximum(p["w"], 0))
case("where_on_a_weight", W, X)(lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0.1))
case("cumsum_weight", W, X)(lambda p, x: x @ jnp.cumsum(p["w"], 0))
case("clipped_weight", W, X)(lambda p, x: x @ jnp.clip(p["w"], -0.3, 0.3))
case("sorted_weight", {"w": weight(5)}, X)(lambda p, x: x @ jnp.sort(p["w"]))
case("normalised_rows", {"w": weight(4, 5)}, X)(
    lambda p, x: x @ jax.nn.softmax(p["w"], axis=1).T
)
case("symmetrised", SQUARE, Y)(lambda p, x: x @ (p["w"] + p["w"].T))
case("skew_cayley", SQUARE, Y)(
    lambda p, x: x @ jnp.linalg.solve(jnp.eye(4) + skew(p["w"]), jnp.eye(4))
)
case("solve_against_data", SQUARE, Y)(
    lambda p, x: jnp.linalg.solve(p["w"] @ p["w"].T + jnp.eye(4), x.T)
)
case("cholesky_factor", SQUARE, Y)(
    lambda p, x: x @ jnp.linalg.cholesky(p["w"] @ p["w"].T + jnp.eye(4))
)
case("matrix_power", SQUARE, Y)(lambda p, x: x @ jnp.linalg.matrix_power(p["w"], 3))
case("fft_of_a_filter", {"w": weight(8)}, real(8))(
    lambda p, x: jnp.fft.irfft(jnp.fft.rfft(p["w"]) * jnp.fft.rfft(x))
)
case("complex_from_two_reals", {"a": weight(4), "b": weight(4)}, Y)(
    lambda p, x: jnp.real(lax.complex(p["a"], p["b"]) * jnp.fft.fft(x))
)
case("complex_polar", {"nu": weight(4), "theta": weight(4)}, Y)(
    lambda p, x: jnp.abs(jnp.exp(-jnp.exp(p["nu"]) + 1j * p["theta"]) + x)
)
case("mixture_weights", {"w": weight(3, 5, 4), "a": weight(3)}, X)(
    lambda p, x: x @ jnp.tensordot(jax.nn.softmax(p["a"]), p["w"], 1)
)
case("hypernetwork", {"h": weight(2, 20)}, (X, real(2)))(
    lambda p, x: x[0] @ jnp.tanh(x[1] @ p["h"]).reshape(5, 4)
)
case("parameter_only_graph", {"a": weight(3, 5), "b": weight(3, 4)}, X)(
    lambda p, x: x @ (jnp.tanh(p["a"]).T @ jnp.sin(p["b"]))
)

# Sharing.
case("shared_alike", SQUARE, Y)(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"])
case("shared_thrice", SQUARE, Y)(
    lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"]
)
case("shared_transposed", W, X)(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T)
case("shared_unlike_layouts", {"w": weight(4, 4)}, real(4, 4))(
    lambda p, x: x @ p["w"] + p["w"] @ jnp.tanh(x)
)
case("shared_same_activations", SQUARE, Y)(lambda p, x: (x @ p["w"]) * (x @ p["w"]))
case("shared_same_activations_squared", SQUARE, Y)(lambda p, x: (x @ p["w"]) ** 2)
case("shared_unlike_lengths", W, (X, real(6, 5), real(5)))(
    lambda p, x: [v @ p["w"] for v in x]
)
case("shared_dense_and_elementwise", W, real(5, 4))(
    lambda p, x: (x.T @ p["w"], x * p["w"])
)
case("shared_dense_and_gather", W, (X, ids(0, 5, 2)))(
    lambda p, x: (x[0] @ p["w"], jnp.tanh(p["w"][x[1]]))
)
case("shared_dense_and_nonlinear", W, X)(
    lambda p, x: (x @ p["w"], jnp.tanh(x) @ jnp.sin(p["w"]))
)
case("shared_reshaped", {"w": weight(4, 6)}, (Y, real(2, 8)))(
    lambda p, x: (x[0] @ p["w"], x[1] @ p["w"].reshape(8, 3))
)
case("shared_scaled_unlike", SQUARE, Y)(
    lambda p, x: jnp.tanh(x @ (0.5 * p["w"])) @ (-3.0 * p["w"])
)
case("shared_einsum_unlike", {"w": weight(3, 3, 3)}, real(2, 3))(
    lambda p, x: (
        jnp.einsum("ti,ijk->tjk", x, p["w"]),
        jnp.einsum("ti,jik->tjk", jnp.tanh(x), p["w"]),
    )
)
case("shared_bias", {"w": weight(4, 4), "b": weight(4)}, Y)(
    lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"]
)
case("unused_leaf", W | {"u": weight(3)}, X)(lambda p, x: x @ p["w"])
case("unused_by_zero_gradient", W | {"u": weight(3)}, X)(
    lambda p, x: x @ p["w"] + lax.stop_gradient(jnp.sum(p["u"]))
)
case("used_only_in_a_comparison", W | {"u": weight(4)}, X)(
    lambda p, x: jnp.where(p["u"] > 0, x @ p["w"], 0.5)
)
case("used_only_in_an_argmax", W | {"u": weight(4)}, X)(
    lambda p, x: (x @ p["w"])[:, jnp.argmax(p["u"])]
)
case("all_but_one_unused", {"a": W, "b": W, "c": {"s": weight()}}, X)(
    lambda p, x: p["c"]["s"] * jnp.sum(x)
)
case("empty_leaf", W | {"e": weight(0, 4)}, X)(
    lambda p, x: x @ p["w"] + x[:, :0] @ p["e"]
)
case("nested_tree", {"a": [weight(5, 4), {"b": (weight(4), None)}]}, X)(
    lambda p, x: jnp.tanh(x @ p["a"][0]) * p["a"][1]["b"][0]
)
case("bare_array", weight(5, 4), X)(lambda p, x: x @ p)

# Regularisers.
case("l2_regulariser", W | {"b": weight(4)}, X)(
    lambda p, x: (x @ p["w"] + p["b"], 0.1 * sum_of_squares(p))
)
case("l2_regulariser_times_data", W, (X, real()))(
    lambda p, x: (x[0] @ p["w"], x[1] * sum_of_squares(p))
)
case("l1_regulariser", W, X)(lambda p, x: (x @ p["w"], jnp.sum(jnp.abs(p["w"]))))
case("group_lasso", W, X)(
    lambda p, x: (x @ p["w"], jnp.sum(jnp.linalg.norm(p["w"], axis=0)))
)
case("vdot_regulariser", W, X)(
    lambda p, x: (x @ p["w"], jnp.vdot(p["w"], p["w"]), jnp.tanh(p["w"]))
)
case("orthogonality_regulariser", SQUARE, Y)(
    lambda p, x: (x @ p["w"], (p["w"].T @ p["w"] - jnp.eye(4)) ** 2)
)

# Biases, scales, scalars.
case("bias_only", {"b": weight(4)}, Y)(lambda p, x: jnp.tanh(x + p["b"]))
case("bias_first_axis", {"b": weight(3)}, Y)(lambda p, x: jnp.tanh(x + p["b"][:, None]))
case("bias_whole", {"b": weight(3, 4)}, Y)(lambda p, x: jnp.tanh(x - p["b"]))
case("bias_size_one_axis", {"b": weight(3, 1)}, Y)(lambda p, x: jnp.tanh(x + p["b"]))
case("bias_scalar", {"b": weight()}, Y)(lambda p, x: jnp.tanh(x + p["b"]))
case("bias_of_length_one", {"b": weight(1)}, Y)(lambda p, x: jnp.tanh(p["b"] + x))
case("bias_broadcast_by_hand", {"b": weight(4)}, Y)(
    lambda p, x: x * jnp.broadcast_to(p["b"], (3, 4))
)
case("bias_initial_state", {"h": weight(4), "w": weight(4, 4)}, Y)(
    lambda p, x: [jnp.tanh(p["h"] @ p["w"] + x[0]), jnp.tanh(p["h"] + x[1])]
)
case("scale_only", {"s": weight(4)}, Y)(lambda p, x: jnp.tanh(x * p["s"]))
case("scale_and_bias", {"s": weight(4), "b": weight(4)}, Y)(
    lambda p, x: jnp.tanh(x * (1 + p["s"]) + p["b"])
)
case("scale_scalar", {"s": weight()}, Y)(lambda p, x: jnp.tanh(x * p["s"]))
case("scale_temperature", {"w": weight(4, 3), "t": weight()}, Y)(
    lambda p, x: jax.nn.log_softmax(x @ p["w"] / jnp.exp(p["t"]))
)
case("scale_exponent", {"s": weight(4)}, Y)(lambda p, x: (jnp.abs(x) + 0.1) ** p["s"])
case("scale_prelu", {"s": weight(4)}, Y)(lambda p, x: jnp.where(x > 0, x, p["s"] * x))
case("scale_of_the_loss", {"w": weight(4), "s": weight()}, Y)(
    lambda p, x: jnp.sum(x @ p["w"]) * p["s"]
)
case("scale_swish_beta", {"s": weight()}, Y)(
    lambda p, x: x * jax.nn.sigmoid(p["s"] * x)
)
case("scale_select_by_data", {"a": weight(4), "b": weight(4)}, (Y, ids(0, 2)))(
    lambda p, x: jnp.where(x[1] == 0, p["a"], p["b"]) * x[0]
)
case("scale_maximum_with_data", {"s": weight(4)}, Y)(
    lambda p, x: jnp.maximum(x, p["s"]) ** 2
)
case("scale_clamp_by_parameters", {"lo": weight(), "hi": weight()}, Y)(
    lambda p, x: jnp.clip(x, p["lo"] - 1, p["hi"] + 1) ** 2
)
case("scale_threshold_of_data", {"s": weight(4)}, Y)(
    lambda p, x: jnp.where(x > p["s"], x * p["s"], 0)
)
case("scale_double_where", {"s": weight(4)}, ids(0, 3, 3, 4))(
    lambda p, x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1) * p["s"] ** 2 + 1), 0)
)

# Random numbers in an example.
case("random_dropout", W, (X, key()))(
    lambda p, x: jnp.tanh(x[0] * jax.random.bernoulli(x[1], 0.5, (3, 5))) @ p["w"]
)
case("random_dropout_after", W | {"v": weight(4, 2)}, (X, key()))(
    lambda p, x: (
        jnp.where(jax.random.bernoulli(x[1], 0.7, (3, 4)), x[0] @ p["w"], 0) @ p["v"]
    )
)
case("random_dropconnect", W, (X, key()))(
    lambda p, x: x[0] @ (p["w"] * jax.random.bernoulli(x[1], 0.5, (5, 4)))
)
case("random_bayesian_layer", {"mu": weight(5, 4), "rho": weight(5, 4)}, (X, key()))(
    lambda p, x: (
        x[0] @ (p["mu"] + jax.nn.softplus(p["rho"]) * jax.random.normal(x[1], (5, 4)))
    )
)
case("random_keys_split", W, (X, key()))(
    lambda p, x: [
        jax.random.uniform(k, (3, 1)) * x[0] @ p["w"]
        for k in jax.random.split(jax.random.fold_in(x[1], 7))
    ]
)


# Low precision: no engine is exact, none may be further off than vmap.
def rounded(x: Any) -> Any:
    """Rounding to bfloat16 whose derivative is one."""
    return x + lax.stop_gradient(x.astype(jnp.bfloat16).astype(x.dtype) - x)


def mixed(p: Any, x: Any) -> Any:
    """A dense network that computes in bfloat16 with float32 parameters."""
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (p, x))
    return two_layers(*low)


def two_layers(p: Any, x: Any) -> Any:
    """A dense network in the precision of its arguments."""
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def two_layers_rounded(p: Any, x: Any) -> Any:
    """The same at the rounded parameters and inputs, without further rounding."""
    return two_layers(*jax.tree.map(rounded, (p, x)))


TWO = {"w": weight(5, 4), "b": weight(4), "v": weight(4, 2)}
case("bf16_round_trip", W, X, exact=lambda p, x: x @ rounded(p["w"]))(
    lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(x.dtype)
)
case("bf16_compute", TWO, X, exact=two_layers_rounded)(mixed)
case("bf16_sequence", TWO, real(24, 5), exact=two_layers_rounded)(mixed)
case(
    "bf16_parameters",
    {"w": bfloat16(5, 4)},
    X,
    exact=lambda p, x: x @ p["w"].astype(x.dtype),
)(lambda p, x: x.astype(jnp.bfloat16) @ p["w"])
case(
    "bf16_mixed_leaves",
    {"w": bfloat16(5, 4), "v": weight(4, 2)},
    X,
    exact=lambda p, x: jnp.tanh(x @ p["w"].astype(x.dtype)) @ p["v"],
)(lambda p, x: jnp.tanh(x @ p["w"].astype(x.dtype)) @ p["v"])
case(
    "bf16_accumulated_wider",
    W,
    real(24, 5),
    exact=lambda p, x: rounded(x) @ rounded(p["w"]),
)(
    lambda p, x: lax.dot_general(
        x.astype(jnp.bfloat16),
        p["w"].astype(jnp.bfloat16),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
)
case("float16_compute", TWO, X, exact=two_layers)(
    lambda p, x: two_layers(*jax.tree.map(lambda v: v.astype(jnp.float16), (p, x)))
)


def thirds(w: Any) -> list[Any]:
    """A fused kernel's three equal column blocks."""
    return jnp.split(w, 3, axis=1)


def skew(w: Any) -> Any:
    """A skew-symmetric matrix."""
    return w - w.T


def sum_of_squares(p: Any) -> Any:
    """The usual weight decay."""
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(p))


def top_value(w: Any) -> Any:
    """Largest singular value by power iteration, as spectral normalisation does."""
    u = jnp.ones(w.shape[1])
    for _ in range(3):
        u = lax.stop_gradient(w.T @ (w @ u) / jnp.linalg.norm(w.T @ (w @ u)))
    return jnp.linalg.norm(w @ u)
