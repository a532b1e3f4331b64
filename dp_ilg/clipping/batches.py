"""Batches: one leading axis of examples, and its cut into micro-batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.base import ClippedGrad, Example, Params
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import accumulator

_NO_NUMBERS = "USOTMm"
"""NumPy's kinds of strings, objects, dates and times."""


def batch_length(batch: Example) -> int:
    """Length of the batch axis that every leaf of a batch shares.

    Raises:
        ValueError: for an empty tree, a leaf without axes or unequal lengths.
        TypeError: for strings, dates and other objects.

    Example:
        >>> import numpy as np
        >>> batch_length((np.zeros((3, 2)), np.zeros(3)))
        3
    """
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError("The batch is an empty tree; pass at least one array.")
    for x in leaves:
        dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        if isinstance(dtype, np.dtype) and dtype.kind in _NO_NUMBERS:
            raise TypeError(
                f"The batch holds an array of dtype {dtype}, with which JAX cannot "
                "compute; encode it as numbers, or leave it out of the batch."
            )
    shapes = [jnp.shape(x) for x in leaves]
    if any(len(s) == 0 for s in shapes):
        raise ValueError(
            "The batch holds a scalar, which has no batch axis; give every array a "
            "leading axis of examples."
        )
    lengths = sorted({s[0] for s in shapes})
    if len(lengths) > 1:
        raise ValueError(
            f"The batch has arrays of unequal length {lengths}; each must hold the "
            "same examples."
        )
    return lengths[0]


def split_rows(batch: Example, chunk: int) -> Example:
    """Cuts every leaf into micro-batches, the last filled up with zeros.

    Args:
        batch: arrays with one batch axis.
        chunk: rows of a micro-batch.

    Returns:
        The same tree, each leaf ``[micro-batches, chunk, ...]``.

    Example:
        >>> split_rows(jnp.arange(1, 4), 2).tolist()
        [[1, 2], [3, 0]]
    """

    def split(x: Any) -> Array:
        x = jnp.asarray(x)
        count = -(-x.shape[0] // chunk)
        missing = count * chunk - x.shape[0]
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            tail = x[jnp.zeros(missing, jnp.int32)]
        else:
            tail = jnp.zeros((missing, *x.shape[1:]), x.dtype)
        return jnp.concatenate([x, tail]).reshape(count, chunk, *x.shape[1:])

    return jax.tree.map(split, batch)


def zero_sum(params: Params, geometry: Geometry, l2_clip_norm: Any) -> ClippedGrad:
    """The clipped sum over nobody.

    Args:
        params: the parameters.
        geometry: of the clip.
        l2_clip_norm: of the clip.

    Returns:
        A `ClippedGrad` of zeros, without metrics.

    Example:
        >>> geometry = Geometry.uniform({"w": jnp.ones(2)})
        >>> zero_sum({"w": jnp.ones(2)}, geometry, 1.0).gradients["w"].tolist()
        [0.0, 0.0]
    """
    sums, low, fine = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), params)
        for _ in range(3)
    )
    trained = [leaf.dtype for leaf in geometry.groups.leaves if leaf.groups]
    widest = jnp.result_type(*[accumulator(dtype) for dtype in trained])
    shares = jnp.zeros(len(geometry.groups.names), jnp.float32)
    bound = jnp.asarray(l2_clip_norm, widest)
    fits = jnp.zeros(1 + len(geometry.groups.names), jnp.float32)
    return ClippedGrad(sums, shares, geometry, bound, fits, low, fine, shares)
