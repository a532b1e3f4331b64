"""The public grid: clipped sums as whole multiples of a step, added without rounding.

Float32 sums round, and what they round by depends on everybody who is in them: two
sums that differ by one example can then be further apart than that example is long.
Whole multiples of one public power of two do not round. A sum is held as three float32
numbers, each a multiple: two for multiples of the group's *step*, one for what lies
below it. Adding such sums is exact, so that neither order nor chunks, devices or hosts
change a bit. NaN in any of them makes the whole sum NaN. docs/sums.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

STEP_BITS = 19
"""The step of a group is at most ``C w_j 2^-19 / sqrt(parameters)``: rounding a sum to
it moves the sum by at most ``C 2^-20`` in the geometry's norm."""
FINE_BITS = 22
"""What lies below the step is held in multiples of ``2^-22`` steps."""
SHARE_STEP = 2.0**-24
"""Step of the layer shares."""
RANGE_BITS = 47
"""Sums below ``2^47`` steps are added exactly."""
_BELOW = 1 - 2.0**-20


class Limbs(NamedTuple):
    """One exact sum: ``high + low + fine``.

    Attributes:
        high: float32, the multiple of the step next to the sum, rounded to float32.
        low: float32, what `high` was rounded by, a multiple of the step.
        fine: float32, what is below the step: at most half of it.
    """

    high: Array
    low: Array
    fine: Array


def grid_steps(geometry: Any, l2_clip_norm: Any) -> Float[Array, " groups"]:
    """The step of every group: a power of two, from public facts.

    Args:
        geometry: weights, traced or not.
        l2_clip_norm: the bound C, traced or not.

    Returns:
        float32 ``[groups]``, the largest powers of two up to
        ``C w_j 2^-19 / sqrt(n)`` with n the parameters of all groups. NaN where C or
        a weight is not finite and positive, or so small (below ``2^-84 sqrt(n)``) that
        float32 does not hold the multiples.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.geometry import Geometry
        >>> geometry = Geometry.uniform({"w": jnp.zeros((4, 4))})
        >>> (grid_steps(geometry, 1.0) * 2**22).tolist()
        [1.0]
    """
    count = max(1, sum(geometry.groups.sizes))
    share = 2.0**-STEP_BITS / math.sqrt(count) * _BELOW
    bound = jnp.asarray(l2_clip_norm, jnp.float32)
    reach = bound * jnp.asarray(geometry.divisors(), jnp.float32)
    step = power_of_two(reach * np.float32(share))
    smallest = jnp.finfo(jnp.float32).tiny * 2.0**FINE_BITS
    usable = jnp.isfinite(step) & (step >= np.float32(smallest))
    return jnp.where(usable, step, np.float32(np.nan))


def power_of_two(value: Array) -> Array:
    """The largest power of two up to a float32, by its exponent bits; 0 below 0.

    Example:
        >>> power_of_two(jnp.float32(5.9)).item()
        4.0
    """
    value = jnp.asarray(value, jnp.float32)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) & np.int32(0x7F800000)
    found = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(value > 0, found, np.float32(0))


def to_grid(value: Array, step: Array) -> Array:
    """The nearest multiple of a step, ties to even; NaN stays NaN.

    Example:
        >>> to_grid(jnp.array([0.3, 0.8, -1.3]), jnp.float32(0.5)).tolist()
        [0.5, 1.0, -1.5]
    """
    step = step.astype(value.dtype)
    return jnp.round(value / step) * step


def two_sum(one: Array, other: Array) -> tuple[Array, Array]:
    """A sum, rounded, and exactly what it was rounded by.

    Example:
        >>> high, low = two_sum(jnp.float32(2.0**30), jnp.float32(3.0))
        >>> high.item(), low.item()
        (1073741824.0, 3.0)

    Reference: Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B.
    """
    high = one + other
    back = high - one
    return high, (one - (high - back)) + (other - back)


def limbs(total: Array, step: Array, dtype: Any = np.float32) -> Limbs:
    """Splits float64 sums, after rounding them to ``2^-22`` steps.

    Args:
        total: float64; call this under ``jax.enable_x64``.
        step: float32, broadcastable against it.
        dtype: of the parts; in float64 the first holds everything above the step.

    Returns:
        The three parts.

    Example:
        >>> with jax.enable_x64(True):
        ...     parts = limbs(jnp.array([2.0**30 + 3.25]), jnp.ones(1, "float32"))
        >>> [x.item() for x in parts]
        [1073741824.0, 3.0, 0.25]
    """
    wide = step.astype(total.dtype)
    unit = wide * np.float64(2.0**-FINE_BITS)
    total = jnp.round(total / unit) * unit
    whole = jnp.round(total / wide) * wide
    high = whole.astype(dtype)
    low = (whole - high.astype(total.dtype)).astype(dtype)
    return Limbs(high, low, (total - whole).astype(dtype))


def add_limbs(one: Limbs, other: Limbs, step: Array) -> Limbs:
    """Adds two exact sums exactly.

    Example:
        >>> half = Limbs(jnp.float32(4.0), jnp.float32(0.0), jnp.float32(0.5))
        >>> [x.item() for x in add_limbs(half, half, jnp.float32(1.0))]
        [9.0, 0.0, 0.0]
    """
    fine = one.fine + other.fine
    carry = to_grid(fine, step)
    high, rest = two_sum(one.high, other.high)
    high, more = two_sum(high, one.low + other.low + carry)
    return Limbs(*two_sum(high, rest + more), fine - carry)


def leaf_steps(geometry: Any, l2_clip_norm: Any) -> list[Array]:
    """The step of every leaf, broadcastable against it; 1 where a leaf is frozen.

    Example:
        >>> from dp_ilg.geometry.geometry import Geometry
        >>> geometry = Geometry.uniform({"a": jnp.zeros(2), "b": jnp.zeros(2)})
        >>> len(leaf_steps(geometry, 1.0))
        2
    """
    steps = geometry.groups.expand(grid_steps(geometry, l2_clip_norm))
    facts = geometry.groups.leaves
    return [
        x if leaf.groups else jnp.ones((), jnp.float32)
        for leaf, x in zip(facts, steps, strict=True)
    ]


def float32_view(clipped: Any) -> list[Any]:
    """The leaves of a sum's gradients beside its remainder: float32, as in ``jit``.

    `dp_ilg.sum_lot` returns float64 leaves, of which compiled functions see float32.

    Example:
        >>> import dp_ilg
        >>> params = {"w": jnp.ones(2)}
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> made = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
        >>> float32_view(made)[0].dtype
        dtype('float32')
    """
    leaves = jax.tree.leaves(clipped.gradients)
    config: Any = jax.config
    if config.jax_enable_x64 or clipped.remainder is None:
        return leaves
    with jax.enable_x64(True):
        return [x.astype(np.float32) if x.dtype == np.float64 else x for x in leaves]


def of_clipped(clipped: Any) -> list[Limbs]:
    """The exact sum of every leaf of a `dp_ilg.ClippedGrad`.

    One that was made by hand has no remainder: its gradients are put on the grid.

    Example:
        >>> import dp_ilg
        >>> params = {"w": jnp.full(2, 1 / 3)}
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> made = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
        >>> (high, low, fine), = of_clipped(made)
        >>> float(abs(high[0] - 1 / 3)) < 2e-6, low.tolist(), fine.tolist()
        (True, [0.0, 0.0], [0.0, 0.0])
    """
    values = float32_view(clipped)
    if clipped.remainder is None:
        steps = leaf_steps(clipped.geometry, clipped.l2_clip_norm)
        highs = [to_grid(x, step) for x, step in zip(values, steps, strict=True)]
        return [Limbs(x, jnp.zeros_like(x), jnp.zeros_like(x)) for x in highs]
    rests = jax.tree.leaves(clipped.remainder)
    fine = [jnp.zeros_like(x) for x in rests]
    if clipped.fine is not None:
        fine = jax.tree.leaves(clipped.fine)
    pairs = map(two_sum, values, rests)
    return [Limbs(*pair, below) for pair, below in zip(pairs, fine, strict=True)]


def as_fields(sums: Sequence[Limbs], treedef: Any) -> dict[str, Any]:
    """Exact sums as the fields `gradients`, `remainder` and `fine`, and back.

    `gradients` is the float32 next to the exact sum, ``gradients + remainder`` the
    multiple of the step.

    Example:
        >>> one = Limbs(*[jnp.float32(x) for x in (8.0, 0.0, 0.25)])
        >>> fields = as_fields([one], jax.tree.structure(0.0))
        >>> {name: value.item() for name, value in fields.items()}
        {'gradients': 8.25, 'remainder': -0.25, 'fine': 0.25}
    """
    shown = [x.high + (x.low + x.fine) for x in sums]
    rests = [(x.high - y) + x.low for x, y in zip(sums, shown, strict=True)]
    trees = shown, rests, [x.fine for x in sums]
    names = "gradients", "remainder", "fine"
    found = (jax.tree.unflatten(treedef, list(leaves)) for leaves in trees)
    return dict(zip(names, found, strict=True))


def split_shares(total: Array) -> tuple[Array, Array]:
    """Float64 sums of layer shares as float32 and what that was rounded by.

    Example:
        >>> with jax.enable_x64(True):
        ...     high, low = split_shares(jnp.array([2.0**25 + 1]))
        >>> high.item(), low.item()
        (33554432.0, 1.0)
    """
    high = total.astype(jnp.float32)
    return high, (total - high.astype(total.dtype)).astype(jnp.float32)


def joined(one: Any, other: Any) -> dict[str, Any]:
    """The exact sum of two `dp_ilg.ClippedGrad` of one geometry, as fields of one."""
    steps = leaf_steps(one.geometry, one.l2_clip_norm)
    sums = zip(of_clipped(one), of_clipped(other), steps, strict=True)
    fields = as_fields(
        [add_limbs(a, b, step) for a, b, step in sums],
        jax.tree.structure(one.gradients),
    )
    high, rest = two_sum(one.layer_shares, other.layer_shares)
    lows = [c.shares_remainder for c in (one, other) if c.shares_remainder is not None]
    high, low = two_sum(high, sum(lows, rest))
    return fields | {"layer_shares": high, "shares_remainder": low}
