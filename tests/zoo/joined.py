"""Cases: parameters that are joined before they are used, or read backwards."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from tests.zoo.core import Case, Table, batch_of, float_type, ids, weight
from tests.zoo.models import linen
from tests.zoo.views import IMAGE, Y, conv

CASES = Table()
case = CASES.case
PAIR = {"a": weight(4, 3), "b": weight(4, 2)}
TALL = {"a": weight(1, 5), "b": weight(3, 5)}
SQUARES = {"a": weight(4, 4), "b": weight(4, 4)}
KERNEL = {"w": weight(3, 2, 2, 4)}


def join(*parts, axis=-1):
    """Parts along the last axis, if no other is named."""
    return jnp.concatenate(parts, axis)


def looped(w, x):
    """A recurrence whose kernel was made outside of it."""

    def turn(h, v):
        return jnp.tanh((v @ w)[4:] + h), None

    return lax.scan(turn, jnp.zeros(4), x)[0]


# Joined along an axis of the output, of the sum, and both.
case("joined_outputs", PAIR, Y)(lambda p, x: x @ join(p["a"], p["b"]))
case("joined_inputs", TALL, Y)(lambda p, x: x @ join(p["a"], p["b"], axis=0))
case("joined_turned", PAIR, Y)(lambda p, x: join(p["a"], p["b"]).T @ x.T)
case("joined_left_inputs", TALL, Y)(lambda p, x: join(p["a"], p["b"], axis=0).T @ x.T)
case("joined_turned_pieces", {"a": weight(3, 4), "b": weight(4, 2)}, Y)(
    lambda p, x: x @ join(-2 * p["a"].T, p["b"] / 3)
)
case("joined_with_itself", SQUARES, Y)(
    lambda p, x: x @ join(p["a"], p["b"], p["a"].T, 0.5 * p["a"])
)
case("joined_with_numbers", PAIR, Y)(
    lambda p, x: x @ join(p["a"], jnp.ones((4, 2)), p["b"])
)
case("joined_with_data", PAIR, Y)(lambda p, x: x @ join(p["a"], jnp.tanh(x).T))
case("joined_with_what_is_squared", PAIR, Y)(lambda p, x: x @ join(p["a"], p["b"] ** 2))
case("joined_twice", SQUARES | {"c": weight(4, 1)}, Y)(
    lambda p, x: x @ join(join(p["a"], p["c"]), p["b"])
)
case("joined_crosswise", SQUARES, Y)(
    lambda p, x: x @ join(join(p["a"], p["b"]), join(p["b"], p["a"]), axis=0)[:4]
)
case("joined_as_a_batch", {"a": weight(1, 4, 3), "b": weight(2, 4, 3)}, Y)(
    lambda p, x: jnp.einsum("ti,hio->hto", x, join(p["a"], p["b"], axis=0))
)
case("joined_heads", {"a": weight(4, 2, 3), "b": weight(4, 1, 3)}, Y)(
    lambda p, x: jnp.einsum("ti,iho->tho", x, join(p["a"], p["b"], axis=1))
)
case("joined_and_apart", PAIR, Y)(
    lambda p, x: (x @ join(p["a"], p["b"]), jnp.tanh(x) @ p["a"])
)
case("joined_backwards", PAIR, Y)(lambda p, x: x @ join(p["a"], p["b"])[::-1])
case("joined_biases", {"a": weight(3), "b": weight(1)}, Y)(
    lambda p, x: jnp.tanh(x + join(p["a"], p["b"]))
)
case("joined_tables", {"a": weight(3, 2), "b": weight(4, 2)}, ids(0, 7, 4))(
    lambda p, i: join(p["a"], p["b"], axis=0)[i]
)
case("joined_conv_outputs", {"a": weight(3, 3, 2, 3), "b": weight(3, 3, 2, 1)}, IMAGE)(
    lambda p, x: conv(x, join(p["a"], p["b"]))
)
case("joined_conv_inputs", {"a": weight(3, 3, 1, 3), "b": weight(3, 3, 1, 3)}, IMAGE)(
    lambda p, x: conv(x, join(p["a"], p["b"], axis=2))
)
case("joined_conv_windows", {"a": weight(1, 3, 2, 3), "b": weight(2, 3, 2, 3)}, IMAGE)(
    lambda p, x: conv(x, join(p["a"], p["b"], axis=0))
)
case("joined_in_a_loop", SQUARES, Y)(
    lambda p, x: lax.scan(
        lambda h, v: (jnp.tanh((v @ join(p["a"], p["b"]))[:4] + h), None),
        jnp.zeros(4),
        x,
    )[0]
)
case("joined_before_a_loop", SQUARES, Y)(lambda p, x: looped(join(p["a"], p["b"]), x))
case("joined_layers", {"a": weight(1, 4, 4), "b": weight(2, 4, 4)}, Y)(
    lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, join(p["a"], p["b"], axis=0)
    )[0]
)

# Read backwards.
case("backwards_inputs", {"w": weight(4, 3)}, Y)(lambda p, x: x @ p["w"][::-1])
case("backwards_outputs", {"w": weight(4, 3)}, Y)(lambda p, x: x @ p["w"][:, ::-1])
case("backwards_twice", {"w": weight(4, 3)}, Y)(
    lambda p, x: x @ jnp.flip(p["w"][::-1], (0, 1))
)
case("backwards_part", {"w": weight(8, 5)}, Y)(
    lambda p, x: x @ lax.rev(p["w"][1::2, 1:4], (0, 1))
)
case("backwards_of_a_reshape", {"w": weight(12)}, Y)(
    lambda p, x: x @ lax.rev(p["w"].reshape(4, 3), (1,))
)
case("backwards_then_reshaped", {"w": weight(2, 6)}, Y)(
    lambda p, x: x @ lax.rev(p["w"], (1,)).reshape(4, 3)
)
case("backwards_then_sliced", {"w": weight(6, 3)}, Y)(
    lambda p, x: x @ lax.rev(p["w"], (0,))[1:5]
)
case("backwards_and_forwards", {"w": weight(4, 4)}, Y)(
    lambda p, x: (x @ p["w"], x @ p["w"][::-1])
)
case("backwards_rows", {"w": weight(5, 3)}, ids(0, 5, 4))(lambda p, i: p["w"][::-1][i])
case("backwards_columns_of_rows", {"w": weight(5, 3)}, ids(0, 5, 4))(
    lambda p, i: p["w"][:, ::-1][i]
)
case("backwards_layers", {"w": weight(3, 4, 4)}, Y)(
    lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][::-1])[0]
)
case("backwards_window", KERNEL, IMAGE)(lambda p, x: conv(x, jnp.flip(p["w"], (0, 1))))
case("backwards_window_strided", KERNEL, IMAGE)(
    lambda p, x: conv(x, jnp.flip(p["w"], (0, 1)), window_strides=(2, 2))
)
case("backwards_channels_grouped", {"w": weight(3, 3, 1, 4)}, IMAGE)(
    lambda p, x: conv(x, jnp.flip(p["w"], (3,)), feature_group_count=2)
)


@CASES.build
def linen_conv_transpose_turned() -> Case:
    """A transposed convolution that turns its kernel."""
    model = nn.ConvTranspose(3, (2, 3), strides=(2, 2), transpose_kernel=True)
    return linen(model, batch_of(4, 5, 2))


@CASES.build
def linen_optimized_lstm() -> Case:
    """A recurrent layer that joins its kernels."""
    return linen(
        nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=float_type())), batch_of(4, 2)
    )
