"""Maximum pooling with a derivative that is fast on a CPU.

XLA:CPU runs the derivative JAX writes for it, a select-and-scatter, entry by entry: in
a small convolutional network that was half of the whole step. Here the forward pass
keeps which entry of each window won, and the derivative is a few vectorised sums.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_LARGEST = 16
"""Entries of the largest window taken; work grows with them."""


class Window(NamedTuple):
    """The static facts of one pooling.

    Attributes:
        sizes: of the window, by axis.
        strides: by axis.
        padding: (low, high) of every axis.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def offsets(self) -> list[tuple[int, ...]]:
        """Where the entries of a window lie, in the order in which ties are settled."""
        return list(itertools.product(*map(range, self.sizes)))


def pooling(eqn: Any) -> Callable[[Array], Array] | None:
    """A faster way to evaluate a ``reduce_window_max``, or None where there is none.

    Args:
        eqn: the equation.

    Returns:
        A function of its operand with the same value, and the same derivative: of
        equal entries the first wins.
    """
    p = eqn.params
    window = Window(
        tuple(p["window_dimensions"]),
        tuple(p["window_strides"]),
        tuple(tuple(x) for x in p["padding"]),
    )
    real = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    plain = real and {*p["base_dilation"], *p["window_dilation"]} <= {1}
    inside = all(low >= 0 <= high for low, high in window.padding)
    if not (plain and inside and 1 < math.prod(window.sizes) <= _LARGEST):
        return None
    if 0 in eqn.outvars[0].aval.shape:
        return None
    return functools.partial(_pool, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(window: Window, x: Array) -> Array:
    return _forward(window, x)[0]


def _forward(window: Window, x: Array) -> tuple[Array, Any]:
    """The largest entry of every window; which one it was, and the input's shape."""
    pads = [(low, high, 0) for low, high in window.padding]
    x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), pads)
    room = [n - size + 1 for n, size in zip(x.shape, window.sizes, strict=True)]
    cuts = [
        lax.slice(x, at, [a + n for a, n in zip(at, room, strict=True)], window.strides)
        for at in window.offsets()
    ]
    best, won = cuts[0], jnp.zeros(cuts[0].shape, jnp.int8)
    for number, cut in enumerate(cuts[1:], 1):
        won = jnp.where(best >= cut, won, jnp.int8(number))
        best = jnp.maximum(best, cut)
    return best, (won, jnp.zeros((0, *x.shape), x.dtype))


def _backward(window: Window, saved: Any, cotangent: Array) -> tuple[Array]:
    """Gives each window's derivative to the entry that won it."""
    won, like = saved
    full = like.shape[1:]
    facts = zip(window.sizes, full, cotangent.shape, window.strides, strict=True)
    pads = [(size - 1, n - (m - 1) * s - 1, s - 1) for size, n, m, s in facts]
    given = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), pads)
    won = lax.pad(won, jnp.int8(-1), pads)
    total = jnp.zeros(full, cotangent.dtype)
    for number, offset in enumerate(window.offsets()):
        start = [n - 1 - at for n, at in zip(window.sizes, offset, strict=True)]
        end = [at + n for at, n in zip(start, full, strict=True)]
        mine = lax.slice(won, start, end) == number
        total = total + jnp.where(mine, lax.slice(given, start, end), 0)
    start = [low for low, _ in window.padding]
    ends = zip(full, window.padding, strict=True)
    return (lax.slice(total, start, [n - high for n, (_, high) in ends]),)


_pool.defvjp(_forward, _backward)
