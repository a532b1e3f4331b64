"""Strided convolutions of few channels as convolutions without stride.

A window that moves by s meets the input at s phases. With the phases as channels
(space to depth) it moves by 1: the same sums, which XLA:CPU computes up to five times
as fast where channels are few, as in the first layer over grey images, and a gradient
of the kernel that is formed from shifted copies instead of all patches.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

WIDEST = 8
"""Most channels, phases included, of what is rearranged; above, plain is faster."""


def pays(conv: Any, channels: int) -> bool:
    """Whether a convolution is faster with its phases as channels.

    Args:
        conv: the `Convolution`.
        channels: of its input.

    Returns:
        True for windows larger than their stride, without dilation or groups, over
        few channels.
    """
    larger = all(k > s for k, s in zip(conv.kernel, conv.strides, strict=True))
    plain = {*conv.lhs_dilation, *conv.rhs_dilation, conv.groups} == {1}
    phases = math.prod(conv.strides)
    return plain and larger and 1 < phases and phases * channels <= WIDEST


def unstrided(conv: Any) -> Any:
    """The `Convolution` between what `phased_input` and `phased_kernel` return."""
    ones = (1,) * len(conv.kernel)
    unpadded = ((0, 0),) * len(conv.kernel)
    cells = _cells(conv)
    return dataclasses.replace(conv, strides=ones, padding=unpadded, kernel=cells)


def phased_input(conv: Any, x: Array) -> Array:
    """An input, padded, with its phases as channels.

    Args:
        conv: the `Convolution`.
        x: ``[batch, *spatial, channels]``.

    Returns:
        ``[batch, *spatial / strides, strides x channels]``.
    """
    pads, more = [], []
    facts = zip(x.shape[1:-1], conv.padding, conv.kernel, conv.strides, strict=True)
    for cells, (size, (low, high), window, stride) in zip(
        _cells(conv), facts, strict=True
    ):
        outputs = (size + low + high - window) // stride + 1
        seen = (outputs - 1) * stride + window
        beyond = (outputs + cells - 1) * stride - seen
        unread = seen < size + low  # cut off: no NaN may meet a zero of the kernel
        pads.append((low, seen - size - low + (0 if unread else beyond), 0))
        more.append((0, beyond if unread else 0, 0))
    zero, whole = jnp.zeros((), x.dtype), (0, 0, 0)
    x = lax.pad(x, zero, [whole, *pads, whole])
    x = lax.pad(x, zero, [whole, *more, whole]) if any(map(any, more)) else x
    return _phased(x, conv.strides, 1)


def phased_kernel(conv: Any, kernel: Array) -> Array:
    """A kernel with its phases as channels.

    Args:
        conv: the `Convolution`.
        kernel: ``[*kernel, channels, out]``.

    Returns:
        ``[*cells, strides x channels, out]``; zero where cells exceed the kernel.
    """
    facts = zip(_cells(conv), conv.strides, conv.kernel, strict=True)
    pads = [(0, cells * stride - size, 0) for cells, stride, size in facts]
    whole = [*pads, (0, 0, 0), (0, 0, 0)]
    return _phased(lax.pad(kernel, jnp.zeros((), kernel.dtype), whole), conv.strides, 0)


def kernel_gradient(conv: Any, x: Array, cotangent: Array) -> Array:
    """The gradient of a strided convolution's kernel.

    Args:
        conv: the `Convolution`.
        x: ``[batch, *spatial, channels]``.
        cotangent: ``[batch, *output, out]``.

    Returns:
        ``[*kernel, channels, out]``.
    """
    cells, strides, count = _cells(conv), conv.strides, len(conv.kernel)
    found = unstrided(conv).kernel_gradient(phased_input(conv, x), cotangent)
    found = found.reshape(*cells[1:], *strides, x.shape[-1], cells[0], -1)
    place = [2 * count, *range(count - 1)]  # of the cells' axes
    order = [axis for k in range(count) for axis in (place[k], count - 1 + k)]
    found = jnp.transpose(found, (*order, 2 * count - 1, 2 * count + 1))
    whole = [cell * stride for cell, stride in zip(cells, strides, strict=True)]
    found = found.reshape(*whole, x.shape[-1], -1)
    return found[tuple(slice(size) for size in conv.kernel)]


def _cells(conv: Any) -> tuple[int, ...]:
    """Strides a kernel reaches over, by axis."""
    return tuple(-(-k // s) for k, s in zip(conv.kernel, conv.strides, strict=True))


def _phased(x: Array, strides: tuple[int, ...], start: int) -> Array:
    """Moves the phases of the axes from `start` on into the axis after them."""
    count, shape = len(strides), x.shape
    head, tail = shape[:start], shape[start + count + 1 :]
    split = [
        n
        for size, stride in zip(shape[start:], strides, strict=False)
        for n in (size // stride, stride)
    ]
    x = x.reshape(*head, *split, *shape[start + count :])
    spatial = [start + 2 * k for k in range(count)]
    phases = [axis + 1 for axis in spatial]
    rest = range(start + 2 * count, x.ndim)
    x = jnp.transpose(x, (*range(start), *spatial, *phases, *rest))
    sizes = [x.shape[start + k] for k in range(count)]
    return x.reshape(*head, *sizes, math.prod(strides) * shape[start + count], *tail)
