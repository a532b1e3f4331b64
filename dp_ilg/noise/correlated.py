"""Noise that takes back a part of the noise before it, in whole numbers.

The fresh draw of step t is z_t, whole steps of the release's grid. What is added to the
sum is ``m_t = z_t - round(c_1 m_(t-1) + ... + c_(b-1) m_(t-b+1))``: whole numbers too,
computed exactly, each in steps of its own release's standard deviation. So weights,
clip norms and schedules may change from step to step, and noise still cancels as far as
they stay alike.

Who sees the releases of a data set, and guesses it, can compute every m and from them
every z. With one example more, its step moves by p steps of the grid, and the later z
by round(c_i m) - round(c_i (m - p)): within one of c_i p. That is what
`dp_ilg.noise.release.grid_of` is told by `rounding`. What is remembered of m is cut to
32 bits, which brings two numbers no further apart.

Reference: `dp_ilg.accounting.correlated`; docs/correlated.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from dp_ilg.accounting.correlated.strategies import UNIT, length
from dp_ilg.base import Params
from dp_ilg.geometry.layers import group
from dp_ilg.noise.release import LOW_BITS, ROUNDING, Whole

_UNIT_BITS = UNIT.bit_length() - 1
_HALF_BITS = 16  # of a remembered number: products with coefficients fit 32 bits
_LOW = (1 << LOW_BITS) - 1
_MOST = 1 << (31 - LOW_BITS)  # upper parts from here on do not fit 32 bits


class CorrelatedNoiseState(NamedTuple):
    """What the noise of the next step depends on.

    Attributes:
        key: as in `dp_ilg.noise.add_noise.AddImportanceNoiseState`.
        step: as there.
        memory: like the parameters, int32 ``[b - 1, *shape]`` a leaf: the noise of the
            last steps, step t in row ``t mod (b - 1)``; no rows for frozen leaves.

    Privacy: as secret as the key; who knows it can subtract the noise. Keep both in one
    checkpoint: a step that is made again with other memory, on the same data, shows by
    the difference what earlier noise was.
    """

    key: Any
    step: Any
    memory: Any


def empty_memory(params: Params, layers: Any, bands: int) -> Params:
    """The memory before the first step.

    Args:
        params: the parameters; only shapes are read.
        layers: how they are grouped, for which of them are frozen.
        bands: b, at least 2.

    Returns:
        Like `CorrelatedNoiseState.memory`, all 0.

    Example:
        >>> empty_memory({"w": jnp.ones(3)}, "module", 4)["w"].shape
        (3, 3)
    """
    leaves, treedef = jax.tree.flatten(params)
    facts = group(params, layers).leaves
    rows = [
        jnp.zeros(((bands - 1) if leaf.groups else 0, *jnp.shape(x)), jnp.int32)
        for leaf, x in zip(facts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, rows)


def rounding(strategy: tuple[float, ...]) -> float:
    """By how many steps of the grid neighbouring sums can move apart, a fresh draw.

    Args:
        strategy: the coefficients; () for independent noise.

    Returns:
        That of one release, and what b - 1 rounded multiples of it add, relative to
        the length of the strategy.

    Example:
        >>> rounding(()) == ROUNDING, rounding((1.0, 0.75)) == ROUNDING + 0.8
        (True, True)
    """
    return ROUNDING + math.sqrt(max(len(strategy) - 1, 0)) / length(strategy)


def correlated(
    draws: list[Any], memory: Params, step: Any, strategy: tuple[float, ...]
) -> tuple[list[Any], Params]:
    """The noise of a step and the memory after it.

    Args:
        draws: int32 fresh draws, one a leaf, None for a frozen one.
        memory: of the steps before.
        step: which step, from 0.
        strategy: the coefficients, 2 or more.

    Returns:
        `Whole` noise, one a leaf, None for a frozen one; and the memory.

    Raises:
        ValueError: for a leaf that is frozen in the memory and not in the draws, or a
            memory that was cast.

    Privacy: see the module.

    Example:
        >>> memory, two = empty_memory({"w": jnp.ones(1)}, "module", 2), (1.0, 0.5)
        >>> draw = [jnp.array([1000], jnp.int32)]
        >>> for step in range(3):
        ...     (noise,), memory = correlated(draw, memory, step, two)
        ...     print(int(noise.lower[0]))
        1000
        500
        750
    """
    ages = len(strategy) - 1
    step = jnp.asarray(step, jnp.int32)
    age = (step - 1 - jnp.arange(ages, dtype=jnp.int32)) % ages  # of a row, from 0
    units = np.array([round(c * UNIT) for c in strategy[1:]], np.int32)
    factors = jnp.asarray(units)[age]
    rows, treedef = jax.tree.flatten(memory)
    noise: list[Any] = [None] * len(draws)
    for place, draw in enumerate(draws):
        if draw is not None:
            _check_rows(rows[place], ages)
            noise[place] = _less(draw, rows[place], factors)
            now = _remembered(noise[place])
            rows[place] = rows[place].at[step % ages].set(now)
    return noise, jax.tree.unflatten(treedef, rows)


def _check_rows(rows: Array, ages: int) -> None:
    if rows.dtype != jnp.int32:
        raise ValueError(
            f"The memory of correlated noise is {rows.dtype}, but must be int32, which "
            "is exact; leave the state of add_importance_noise out of any cast."
        )
    if rows.shape[0] != ages:
        raise ValueError(
            f"The noise of {ages} steps was to be remembered of every trained leaf, but"
            f" one has room for {rows.shape[0]}; give add_importance_noise the layers "
            "of the other transformations, and the state of its own init."
        )


def _less(draw: Array, rows: Int32[Array, "ages ..."], factors: Array) -> Whole:
    """The draw less the rounded sum of what is remembered times its factor, exactly.

    Factors are below 2^12 and add up to less than 2^15, so both sums fit 32 bits:
    15 x 2^11 x 2^16 < 2^31.
    """
    high, low = _sums(rows, factors)
    low = (low + UNIT // 2) >> _UNIT_BITS
    place = _HALF_BITS - _UNIT_BITS  # high counts in units of 2^5 steps
    kept = LOW_BITS - place
    upper = (draw >> LOW_BITS) - (high >> kept)
    lower = (draw & _LOW) - ((high & ((1 << kept) - 1)) << place) - low
    return Whole(upper + (lower >> LOW_BITS), lower & _LOW)


def _sums(rows: Array, factors: Array) -> tuple[Array, Array]:
    """Of the upper and of the lower halves, in one pass over the memory."""
    by = factors.reshape(-1, *[1] * (rows.ndim - 1))
    halves = (rows >> _HALF_BITS) * by, (rows & ((1 << _HALF_BITS) - 1)) * by
    start = np.int32(0), np.int32(0)
    return lax.reduce(halves, start, lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))


def _remembered(noise: Whole) -> Int32[Array, "..."]:
    """The noise as one number of 32 bits, the nearest there is."""
    fits = (noise.upper >= -_MOST) & (noise.upper < _MOST)
    ends = jnp.where(noise.upper < 0, np.int32(-(2**31)), np.int32(2**31 - 1))
    return jnp.where(fits, (noise.upper << LOW_BITS) + noise.lower, ends)
