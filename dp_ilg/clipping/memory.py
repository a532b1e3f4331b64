"""How much memory a clipped gradient takes, and the micro-batch that fits a budget.

XLA knows the size of a program's temporary memory once it is compiled, and nothing has
to run for it. What a batch of any length takes is that of one micro-batch, since the
clipped sums of micro-batches add up in place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from dp_ilg import validation
from dp_ilg.base import Example, Params
from dp_ilg.clipping.batches import batch_length
from dp_ilg.clipping.clipped_grad import ClippedGradFn
from dp_ilg.geometry.geometry import Geometry


def temporary_bytes(
    grad_fn: ClippedGradFn, params: Params, batch: Example, layers: Any = "module"
) -> int:
    """Memory a compiled clipped gradient holds beside its inputs and its result.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: the parameters; only shapes and dtypes are read.
        batch: the batch, likewise.
        layers: how the geometry groups the leaves, see `dp_ilg.layers`.

    Returns:
        Bytes, by XLA's own account; 0 where a backend gives none.

    Raises:
        ValueError: as a call of `grad_fn` would.

    Privacy: shapes alone are read.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> temporary_bytes(grad_fn, {"w": jnp.zeros((50, 60))}, jnp.ones((8, 50))) > 0
        True
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch)
    )
    geometry = jax.eval_shape(lambda p: Geometry.uniform(p, layers), shapes[0])

    def call(params: Params, batch: Example, geometry: Geometry) -> Any:
        return grad_fn(params, batch, geometry=geometry)

    compiled = jax.jit(call).lower(*shapes, geometry).compile()
    return int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0))


def fit_microbatch(
    grad_fn: ClippedGradFn,
    params: Params,
    batch: Example,
    memory_bytes: float,
    layers: Any = "module",
) -> int:
    """The largest micro-batch, up to what the engine would take, that fits a budget.

    Candidates are powers of 2, and each is compiled and asked for its temporary memory;
    since that grows about in proportion, two or three are enough. A larger micro-batch
    than the engine's own choice would be slower, so it is no candidate.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: the parameters; only shapes and dtypes are read.
        batch: a batch of the length that will be used, likewise.
        memory_bytes: the budget for what a gradient holds beside parameters, batch and
            result.
        layers: how the geometry groups the leaves, see `dp_ilg.layers`.

    Returns:
        A size for ``clipped_grad(..., microbatch_size=)``.

    Raises:
        ValueError: for a budget that one example exceeds, or that is not positive.

    Privacy: shapes alone are read; a micro-batch changes the result by rounding only.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> params, batch = {"w": jnp.zeros((50, 60))}, jnp.ones((64, 50))
        >>> most = temporary_bytes(grad_fn, params, batch)
        >>> grad_fn.microbatch(params, batch), fit_microbatch(
        ...     grad_fn, params, batch, 0.5 * most)
        (64, 16)

    Reference: the law "whole batch" of docs/laws.md.
    """
    validation.positive("memory_bytes", memory_bytes)
    most = min(grad_fn.microbatch(params, batch), batch_length(batch))
    needed: dict[int, int] = {}

    def fits(size: int) -> bool:
        if size not in needed:
            own = dataclasses.replace(grad_fn, microbatch_size=size)
            needed[size] = temporary_bytes(own, params, batch, layers)
        return needed[size] <= memory_bytes

    if fits(most):
        return most
    start = 2 ** int(math.log2(max(1, most * memory_bytes / needed[most])))
    found = _largest(fits, min(start, most), most)
    if not found:
        raise ValueError(
            f"A budget of {memory_bytes / 2**20:.3g} MiB is exceeded by a micro-batch "
            f"of 1, which takes {needed[1] / 2**20:.3g} MiB; allow as much, or use a "
            "smaller model."
        )
    return found


def _largest(fits: Callable[[int], bool], start: int, end: int) -> int:
    """The largest power of 2 below `end` that fits, found from near it; 0 if none."""
    size = start
    while size and not fits(size):
        size //= 2
    while size and 2 * size < end and fits(2 * size):
        size *= 2
    return size
