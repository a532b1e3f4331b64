"""A private sum and its noise, added exactly and rounded once.

In floating point a sum of a record and a draw has low bits that depend on the record,
and some results are possible only with it (Mironov 2012). Here the sum is put on a
public grid first, 2^-27 of the noise's standard deviation, the draw is a whole number
of the grid's steps, and both are added as integers. What is released is a function of
that integer alone, so the proof for integers is the proof. Putting a sum on the grid
moves it by at most 1.02 steps a coordinate; the noise grows by what that costs.

Reference: docs/noise_law.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dp_ilg.noise.table import GRID_BITS

ROUNDING = 2.1  # steps by which two sums, put on the grid, can move apart
_HEADROOM = np.float32(1 + 2.0**-20)  # for the float32 product that is the stddev
_DIGIT = 12  # bits of a digit, and of a standard deviation: products of 24 are exact
LOW_BITS = 2 * _DIGIT  # of the lower of two parts of the integer
_MOST_DIGIT = 2.0**_DIGIT - 1
_TOP, _MOST_LAST = 126.0, 2.0**23 + 2.0**12  # the upper part fits 31 bits
_LEAST, _MOST = np.float32(2.0**-80), np.float32(2.0**80)
_DROPPED = np.uint32(0xFFF)  # bits of a float32 that are not among the first 12


class Whole(NamedTuple):
    """A whole number of grid steps that may need more than 32 bits.

    Attributes:
        upper: int32.
        lower: int32, of which `LOW_BITS` are used: ``upper 2^24 + lower`` in all.
    """

    upper: Any
    lower: Any


class Grid(NamedTuple):
    """The noise of a release and the grid that it lies on, all of it public.

    Attributes:
        stddev: the standard deviation drawn with, float32: 12 significant bits, at
            least what was asked and at most 0.06 % above it.
        step: the grid's step, ``stddev 2^-27``, exactly.
        valid: whether bound and noise are positive and finite; else NaN is released.
        bare: whether the plan says that there is no noise at all.
    """

    stddev: Any
    step: Any
    valid: Any
    bare: Any


def largest_multiplier(count: int, rounding: float = ROUNDING) -> float:
    """Above this noise multiplier the grid is too coarse for so many coordinates.

    Args:
        count: noised coordinates of the release.
        rounding: as in `grid_of`.

    Returns:
        The multiplier at which noise would have to be a tenth larger.

    Example:
        >>> round(largest_multiplier(1_000_000))
        5810
    """
    return 2.0**GRID_BITS / (11 * rounding * math.sqrt(max(count, 1)))


def grid_of(
    reach: Any, multiplier: Any, count: int, rounding: float = ROUNDING
) -> Grid:
    """The grid for noise of a multiplier, enlarged by what rounding costs.

    Args:
        reach: how far one example moves the sum, in the sum's units (C w_j for a
            group); float32 of any shape, perhaps traced.
        multiplier: the noise multiplier sigma; 0 adds none.
        count: noised coordinates of the whole release.
        rounding: steps by which two sums on the grid can move apart a coordinate;
            more where noise is correlated (`dp_ilg.noise.correlated`).

    Returns:
        The grid, shaped like `reach`.

    Privacy: two neighbouring sums put on the grid differ, in standard deviations, by at
    most ``2.1 sqrt(count) 2^-27`` more than the sums; the standard deviation is
    ``1 / (1 - multiplier 2.1 sqrt(count) 2^-27)`` times what was asked, so that the
    multiplier holds after rounding.

    Example:
        >>> grid = grid_of(jnp.float32(1.0), 1.0, 1_000_000)
        >>> 1.0 < float(grid.stddev) < 1.0006, float(grid.step * 2**27 / grid.stddev)
        (True, 1.0)
    """
    share = np.float32(rounding * math.sqrt(count) * 2.0**-GRID_BITS)
    reach = jnp.asarray(reach, jnp.float32)
    sigma = jnp.asarray(multiplier, jnp.float32)
    bare, left = sigma == 0, 1 - sigma * share
    wanted = jnp.where(bare, 1, sigma) * reach * (_HEADROOM / left)
    valid = (left > 0.9) & (wanted > _LEAST) & (wanted < _MOST)  # NaN is none of these
    bits = lax.bitcast_convert_type(jnp.where(valid, wanted, 1), jnp.uint32)
    upwards = (bits + _DROPPED) & ~_DROPPED
    used = lax.bitcast_convert_type(upwards, jnp.float32)
    return Grid(used, used * np.float32(2.0**-GRID_BITS), valid & (reach > 0), bare)


def noised(value: Any, remainder: Any, grid: Grid, steps: Any) -> Float[Array, "..."]:
    """The sum plus its noise: exactly, and then rounded to the sum's dtype.

    Args:
        value: the sum, float32 or wider.
        remainder: what the sum is more than `value`, or None for nothing.
        grid: from `grid_of`, broadcast against the sum.
        steps: the draw, int32 like the sum, or `Whole`.

    Returns:
        Float32, or the wider dtype. NaN where the sum is not finite, or its bound or
        the noise is not positive and finite; the sum itself where the plan has no
        noise. Sums of more than 260 million standard deviations are cut there.

    Privacy: a function of the integer ``q + steps``, where q depends on the sum and
    `steps` has the law that is accounted.

    Example:
        >>> grid = grid_of(jnp.ones(2), 1.0, 2)
        >>> steps = jnp.array([1 << 27, -(1 << 27)], jnp.int32)
        >>> found = noised(jnp.array([5.0, 7.0]), None, grid, steps)
        >>> [round(float(x), 2) for x in found]
        [6.0, 6.0]
    """
    value = jnp.asarray(value)
    high = value.astype(jnp.float32)
    low = (value - high.astype(value.dtype)).astype(jnp.float32)
    if remainder is not None:
        low = low + remainder.astype(jnp.float32)
    upper, lower = _on_grid(high, low, grid.step)
    if isinstance(steps, Whole):
        upper, steps = upper + steps.upper, steps.lower
    total = lower + steps
    upper = upper + (total >> LOW_BITS)
    rest = (total & ((1 << LOW_BITS) - 1)).astype(jnp.float32) + 0.5
    found = _scaled(upper.astype(jnp.float32), grid.step, LOW_BITS) + rest * grid.step
    good = grid.valid & jnp.isfinite(high) & jnp.isfinite(low)
    found = jnp.where(grid.bare, value, found.astype(value.dtype))
    return jnp.where(good, found, jnp.nan)


def _on_grid(high: Array, low: Array, step: Array) -> tuple[Array, Array]:
    """The nearest whole number of steps, or next to it: ``upper 2^24 + lower``.

    Digits of 12 bits, from the top: a digit times the step has 24 bits, so the product
    and what is left of the sum are exact in float32, with or without fused operations.
    """
    inverse = 1 / step
    upper, rest = jnp.zeros(high.shape, jnp.int32), high
    for place, most in ((4, _TOP), (3, _MOST_DIGIT), (2, _MOST_DIGIT)):
        digit, rest = _split(rest, step, inverse, _DIGIT * place, most)
        upper = (upper << _DIGIT) + digit
    more, low = _split(low, step, inverse, LOW_BITS, _TOP)
    middle, rest = _split(rest, step, inverse, _DIGIT, _MOST_DIGIT)
    last, _ = _split(rest + low, step, inverse, 0, _MOST_LAST)
    return upper + more, (middle << _DIGIT) + last


def _split(
    rest: Array, step: Array, inverse: Array, bits: int, most: float
) -> tuple[Array, Array]:
    """A digit of weight 2^bits steps, and what it leaves; NaN has the digit 0."""
    digit = jnp.clip(jnp.round(rest * _scaled(inverse, 1, -bits)), -most, most)
    rest = rest - digit * _scaled(step, 1, bits)
    return jnp.nan_to_num(digit).astype(jnp.int32), rest


def _scaled(value: Array, by: Any, bits: int) -> Array:
    """Times `by` and a power of two."""
    return value * (by * np.float32(2.0**bits))


def on_host(value: np.ndarray, stddev: float, steps: Any) -> np.ndarray:
    """`noised` for float64 arrays outside of JAX.

    Args:
        value: the sum, float64.
        stddev: of the noise, above 0; the caller has allowed for rounding.
        steps: the draw, int32 like the sum.

    Returns:
        Float64: a function of the integer that is the sum on the grid plus the draw.

    Privacy: as `noised`; the sum moves by at most one step of ``stddev 2^-27``.

    Example:
        >>> on_host(np.array([3.0]), 1.0, np.array([1 << 27], np.int32)).round(6)
        array([4.])
    """
    step = float(stddev) * 2.0**-GRID_BITS
    most = 2.0**51  # up to here the quotient is off by less than half a step
    placed = np.clip(np.rint(np.asarray(value, np.float64) / step), -most, most)
    whole = np.nan_to_num(placed).astype(np.int64) + np.asarray(steps, np.int64)
    return np.where(np.isnan(placed), np.nan, (whole + 0.5) * step)


def allowed_stddev(stddev: float, multiplier: float, count: int) -> float:
    """A standard deviation for `on_host`, enlarged by what rounding costs.

    Args:
        stddev: asked for, above 0.
        multiplier: its ratio to how far one example moves the sum.
        count: coordinates of the release.

    Returns:
        The standard deviation to use, float64.

    Raises:
        ValueError: for a multiplier too large for so many coordinates.

    Example:
        >>> 1.0 < allowed_stddev(1.0, 2.0, 100) < 1.000001
        True
    """
    check_multiplier(multiplier, count)
    share = multiplier * ROUNDING * math.sqrt(count) * 2.0**-GRID_BITS
    return stddev / (1 - share)


def check_multiplier(multiplier: float, count: int, rounding: float = ROUNDING) -> None:
    """Raises if the grid is too coarse for that much noise on so many coordinates.

    Args:
        multiplier: the largest noise multiplier of the plan.
        count: noised coordinates of a release.
        rounding: as in `grid_of`.

    Raises:
        ValueError: above `largest_multiplier`.

    Example:
        >>> check_multiplier(1e6, 100)
        Traceback (most recent call last):
        ValueError: The noise multiplier is 1e+06, but ...
    """
    most = largest_multiplier(count, rounding)
    if multiplier > most:
        raise ValueError(
            f"The noise multiplier is {multiplier:g}, but with {count:,} coordinates "
            f"noise is drawn up to {most:.3g}; plan with less noise or a larger batch."
        )
