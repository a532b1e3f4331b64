"""Sums of several devices, added without rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.base import ClippedGrad
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.geometry import grid
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import accumulator


def sum_over_axis(clipped: ClippedGrad, axis_name: Any) -> ClippedGrad:
    """Adds up what each device clipped, inside ``shard_map`` or ``pmap``.

    ``jax.lax.psum`` of the fields would add the bounds up, too, and round. Here every
    number is added exactly, whatever the order in which devices report.

    Args:
        clipped: what `dp_ilg.clipped_grad` returned for the rows of this device, with
            the geometry and clip norm of all others.
        axis_name: the mesh axis, or a tuple of them, as ``jax.lax.psum`` takes it.

    Returns:
        The sum over the axis, on every device. Where devices clipped to different
        bounds, or in different weights, its bound is NaN, so that nothing but NaN can
        be released.

    Raises:
        TypeError: for anything that was not clipped.

    Privacy: sensitivity C, as that of one device, if every example is on one of them.

    Example:
        >>> import dp_ilg
        >>> from jax.sharding import Mesh, PartitionSpec as P
        >>> params, loss = {"w": jnp.zeros(2)}, lambda p, x: p["w"] @ x
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> mesh = Mesh(jax.devices()[:1], ("rows",))
        >>> one = lambda x: sum_over_axis(
        ...     grad_fn(params, x, geometry=geometry), "rows")
        >>> spread = jax.shard_map(one, mesh=mesh, in_specs=P("rows"), out_specs=P(),
        ...     check_vma=False)
        >>> total = jax.jit(spread)(jnp.array([[3.0, 4.0], [0.0, 0.5]]))
        >>> [round(float(x), 3) for x in total.gradients["w"]]
        [0.6, 1.3]
    """
    if not isinstance(clipped, ClippedGrad):
        raise TypeError(
            f"sum_over_axis got {type(clipped).__name__}, which is not clipped; give "
            "it what a dp_ilg.clipped_grad function returned."
        )
    add = lambda x: jax.lax.psum(x, axis_name)  # noqa: E731
    treedef = jax.tree.structure(clipped.gradients)
    fits = None if clipped.fits is None else add(clipped.fits)
    bound = jnp.where(_alike(clipped, axis_name), clipped.l2_clip_norm, jnp.nan)
    shares = reduced_shares(clipped, add)
    metrics = clipped.metrics and clipped.metrics.reduced(add)
    steps = grid.leaf_steps(clipped.geometry, bound)
    sums = zip(grid.of_clipped(clipped), steps, strict=True)
    pairs = [reduced(parts, step, add) for parts, step in sums]
    fields = settled(pairs, treedef, clipped.geometry, bound)
    shares |= {"l2_clip_norm": bound, "fits": fits, "metrics": metrics}
    return dataclasses.replace(clipped, **fields, **shares)


def reduced(
    parts: grid.Limbs, step: Array, add: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """One exact sum, reduced over devices in types in which that does not round.

    Args:
        parts: of this device.
        step: of the public grid.
        add: adds up over devices, such as a ``psum``; fewer than 1,024 of them.

    Returns:
        The multiples of the step in float64; what is below it in int32, of which
        ``2^22`` are a step.

    Example:
        >>> one = grid.Limbs(*[jnp.float32(x) for x in (4.0, 1.0, 0.5)])
        >>> [x.item() for x in reduced(one, jnp.float32(1.0), lambda x: 2 * x)]
        [10.0, 4194304]
    """
    units = jnp.round(parts.fine / step.astype(parts.fine.dtype) * 2.0**grid.FINE_BITS)
    with wide():
        whole = add(widened(parts.high) + widened(parts.low))
        return whole, add(jax.lax.convert_element_type(units, np.dtype(np.int32)))


def reduced_shares(
    clipped: ClippedGrad, add: Callable[[Array], Array]
) -> dict[str, Array]:
    """The layer shares, reduced over devices exactly, as fields of a `ClippedGrad`."""
    low = clipped.shares_remainder
    with wide():
        total = widened(clipped.layer_shares)
        total = add(total if low is None else total + widened(low))
        high, low = grid.split_shares(total)
    return {"layer_shares": high, "shares_remainder": low}


def settled(pairs: Any, treedef: Any, geometry: Geometry, bound: Any) -> dict[str, Any]:
    """What `reduced` gave for every leaf, as fields of a `ClippedGrad`."""
    facts, steps = geometry.groups.leaves, grid.leaf_steps(geometry, bound)
    sums = []
    with wide():
        for leaf, step, (whole, below) in zip(facts, steps, pairs, strict=True):
            unit = widened(step)
            fine = widened(below) * unit * np.float64(2.0**-grid.FINE_BITS)
            carry = jnp.round(fine / unit) * unit
            dtype = accumulator(leaf.dtype)
            high, low, _ = grid.limbs(whole + carry, step, dtype)
            rest = jax.lax.convert_element_type(fine - carry, dtype)
            sums.append(grid.Limbs(high, low, rest))
    return grid.as_fields(sums, treedef)


def _alike(clipped: ClippedGrad, axis_name: Any) -> Array:
    """Whether all devices have this one's weights, coordinates and clip norm."""
    facts = jax.tree.leaves((clipped.geometry, clipped.l2_clip_norm))
    same = [
        jnp.all(jax.lax.pmax(x, axis_name) == jax.lax.pmin(x, axis_name))
        for x in map(jnp.asarray, facts)
    ]
    return jnp.all(jnp.stack(same))
