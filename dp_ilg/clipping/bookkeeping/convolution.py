"""Convolutions in the one layout XLA's CPU kernels are fast in, and their patches.

XLA:CPU falls back to a very slow kernel for convolutions in other layouts inside
loops, which is what JAX's own derivative asks for; here the input's derivative is
written with explicit transposes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dp_ilg.clipping.bookkeeping import phases


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The static facts of one convolution, and what it computes.

    Attributes:
        strides: of the window.
        padding: (low, high) of every spatial axis.
        lhs_dilation: of the input.
        rhs_dilation: of the kernel.
        groups: feature groups.
        kernel: spatial shape of the kernel.
        lhs_spec: axes (batch, channel, *spatial) of the input.
        rhs_spec: axes (out, in, *spatial) of the kernel.
        out_spec: axes (batch, channel, *spatial) of the output.
        precision: as in lax.
        preferred: preferred_element_type, as in lax.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    kernel: tuple[int, ...]
    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    precision: Any
    preferred: Any

    @classmethod
    def of(cls, eqn: Any) -> Convolution:
        """Reads a ``conv_general_dilated`` equation."""
        p = eqn.params
        numbers = p["dimension_numbers"]
        shape = eqn.invars[1].aval.shape
        return cls(
            tuple(p["window_strides"]),
            tuple(tuple(x) for x in p["padding"]),
            tuple(p["lhs_dilation"]),
            tuple(p["rhs_dilation"]),
            p["feature_group_count"],
            tuple(shape[k] for k in numbers.rhs_spec[2:]),
            tuple(numbers.lhs_spec),
            tuple(numbers.rhs_spec),
            tuple(numbers.out_spec),
            p["precision"],
            p["preferred_element_type"],
        )

    def channels_last(self, x: Array, spec: tuple[int, ...]) -> Array:
        """An input or output as [batch, *spatial, channels]."""
        return jnp.transpose(x, (spec[0], *spec[2:], spec[1]))

    def apply(self, x: Array, kernel: Array) -> Array:
        """The convolution, as differentiable in `x` alone."""
        out, into, *spatial = self.rhs_spec
        kernel = jnp.transpose(kernel, (*spatial, into, out))
        y: Any = _convolve(self, self.channels_last(x, self.lhs_spec), kernel)
        rank = y.ndim
        order = (self.out_spec[0], *self.out_spec[2:], self.out_spec[1])
        back = [0] * rank
        for place, axis in enumerate(order):
            back[axis] = place
        return jnp.transpose(y, back)

    def patches(self, x: Array) -> Array:
        """What each output sees of the input.

        Args:
            x: [batch, *spatial, channels].

        Returns:
            [batch, *output, *kernel, channels].
        """
        x, count = self._padded(x), len(self.kernel)
        for axis in range(count, 0, -1):
            x = self._stacked(x, axis, count + 1)
        return x

    @property
    def shifts(self) -> bool:
        """Whether `kernel_gradient` applies, and saves much over patches."""
        wide = self.kernel[0] > 1 and math.prod(self.kernel) >= 9
        return len(self.kernel) > 1 and wide and self.strides[0] == self.groups == 1

    def kernel_gradient(self, x: Array, cotangent: Array) -> Array:
        """The kernel's gradient in one product, of shifted inputs and outputs.

        The input is shifted along all but the first spatial axis, the output's
        derivative along the first: less to copy than all patches.

        Args:
            x: [batch, *spatial, channels].
            cotangent: [batch, *output, channels].

        Returns:
            [kernel but its first axis, in, first axis of the kernel, out], the first
            two in one and the last two in one.
        """
        x, count = self._padded(x), len(self.kernel)
        for axis in range(count, 1, -1):
            x = self._stacked(x, axis, count + 1)
        size, step = self.kernel[0], self.rhs_dilation[0]
        reach = cotangent.shape[1] + (size - 1) * step
        x = lax.slice_in_dim(x, 0, reach, axis=1)
        rest = [(0, 0, 0)] * (cotangent.ndim - 2)
        zero = jnp.zeros((), cotangent.dtype)
        rows = [
            lax.pad(
                cotangent,
                zero,
                [(0, 0, 0), (i * step, (size - 1 - i) * step, 0), *rest],
            )
            for i in range(size)
        ]
        given = jnp.stack(rows, -2)
        terms = math.prod(given.shape[:-2])
        return lax.dot_general(
            x.reshape(terms, -1),
            given.reshape(terms, -1),
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    def _padded(self, x: Array) -> Array:
        pads = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(
                self.padding, self.lhs_dilation, strict=True
            )
        ]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def _stacked(self, x: Array, axis: int, place: int) -> Array:
        """Stacks the shifts of the window along one spatial axis at `place`."""
        size = self.kernel[axis - 1]
        stride, dilation = self.strides[axis - 1], self.rhs_dilation[axis - 1]
        reach = (size - 1) * dilation + 1
        count = (x.shape[axis] - reach) // stride + 1
        cuts = [
            lax.slice_in_dim(
                x, i * dilation, i * dilation + (count - 1) * stride + 1, stride, axis
            )
            for i in range(size)
        ]
        return jnp.stack(cuts, place)


def _fast(conv: Convolution, x: Array, kernel: Array) -> Array:
    if not phases.pays(conv, x.shape[-1]):
        return _plain(conv, x, kernel)
    moved = phases.phased_input(conv, x), phases.phased_kernel(conv, kernel)
    return _plain(phases.unstrided(conv), *moved)


def _plain(conv: Convolution, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        conv.strides,
        conv.padding,
        conv.lhs_dilation,
        conv.rhs_dilation,
        _layout(len(conv.kernel)),
        conv.groups,
        precision=conv.precision,
        preferred_element_type=conv.preferred,
    )


def _layout(count: int) -> lax.ConvDimensionNumbers:
    last = count + 1
    spatial = tuple(range(1, last))
    image = (0, last, *spatial)
    return lax.ConvDimensionNumbers(image, (last, count, *range(count)), image)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(conv: Convolution, x: Array, kernel: Array) -> Array:
    return _fast(conv, x, kernel)


def _forward(conv: Convolution, x: Array, kernel: Array) -> tuple[Array, Any]:
    return _fast(conv, x, kernel), (jnp.zeros((0, *x.shape), x.dtype), kernel)


def _backward(conv: Convolution, saved: Any, cotangent: Array) -> tuple[Array, Array]:
    """The input's derivative; the kernel is a constant wherever this is used."""
    like, kernel = saved
    spatial, groups = like.shape[2:-1], conv.groups
    *window, into, out = kernel.shape
    split = kernel.reshape(*window, into, groups, out // groups)
    turned = jnp.swapaxes(split, -3, -1).reshape(*window, out // groups, -1)
    turned = jnp.flip(turned, range(len(window)))
    pads = []
    for k, size in enumerate(spatial):
        dilated = (size - 1) * conv.lhs_dilation[k] + 1
        reach = (window[k] - 1) * conv.rhs_dilation[k] + 1
        spread = (cotangent.shape[k + 1] - 1) * conv.strides[k] + 1
        low = reach - conv.padding[k][0] - 1
        pads.append((low, dilated + reach - 1 - spread - low))
    derivative = lax.conv_general_dilated(
        cotangent,
        turned.astype(cotangent.dtype),
        conv.lhs_dilation,
        pads,
        conv.strides,
        conv.rhs_dilation,
        _layout(len(window)),
        groups,
        precision=conv.precision,
        preferred_element_type=like.dtype if conv.preferred else None,
    )
    return derivative.astype(like.dtype), jnp.zeros_like(kernel)


_convolve.defvjp(_forward, _backward)
