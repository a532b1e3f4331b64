"""The reference engine: per-example gradients by ``jax.vmap``.

Slow and obvious, it is the oracle of every faster engine. An engine maps
``(loss_fn, params, batch, groups)`` to `PerExampleGrads`, in the manner of
``jax.vjp``: numbers and a closure.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads, PyTree
from dp_ilg.geometry.groups import (
    Groups,
    LeafGroups,
    accumulator,
    check_batch_axis,
    cut_batch,
    pieces_of,
)


def vmap_engine(
    loss_fn: LossFn, params: Params, batch: Example, groups: Groups
) -> PerExampleGrads:
    """Instantiates every example's gradient with ``jax.vmap(jax.grad(loss_fn))``.

    Args:
        loss_fn: ``(params, example) -> scalar`` for one example.
        params: any tree of floating-point arrays.
        batch: the same tree as an example, with a leading batch axis.
        groups: the groups of `params`.

    Returns:
        Norms and the weighted sum; memory is batch times parameters.

    Privacy: raw values, see `PerExampleGrads`.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"w": jnp.ones(2)}
        >>> loss = lambda p, x: jnp.sum(p["w"] * x)
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> found = vmap_engine(loss, params, batch, group(params))
        >>> found.norms.round(3).tolist()
        [[5.0], [1.0]]
    """
    gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
    return from_gradients(gradients, groups)


def from_gradients(gradients: PyTree, groups: Groups) -> PerExampleGrads:
    """Norms and weighted sum of gradients that are already there.

    Args:
        gradients: like the parameters, each leaf with a leading batch axis.
        groups: the groups of the parameters.

    Returns:
        The `PerExampleGrads`.

    Raises:
        ValueError: where a leaf has no batch axis or batch axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> groups = group({"w": jnp.ones(2)})
        >>> gradients = {"w": jnp.array([[3.0, 4.0], [jnp.nan, 0.0]])}
        >>> per_example = from_gradients(gradients, groups)
        >>> per_example.weighted_sum(jnp.array([0.5, 0.0]))["w"].tolist()
        [1.5, 2.0]
    """
    leaves, treedef = jax.tree.flatten(gradients)
    check_batch_axis(leaves, groups)
    norms = groups.batch_norms(leaves)

    def weighted_sum(coefficients: Array) -> Params:
        sums = [
            leaf_sum(leaf, value, coefficients)
            for leaf, value in zip(groups.leaves, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, sums)

    return PerExampleGrads(norms, weighted_sum, norms)


def leaf_sum(leaf: LeafGroups, value: Array, coefficients: Array) -> Array:
    """Sum over examples of coefficient times gradient, for one leaf."""
    dtype = accumulator(value.dtype)
    if not leaf.groups:
        return jnp.zeros(leaf.shape, dtype)
    if coefficients.ndim == 1:
        return _contract(coefficients, value.astype(dtype))
    owners = [group for _, _, group in pieces_of(leaf)]
    parts = [
        _contract(coefficients[:, group], piece.astype(dtype))
        for group, piece in zip(owners, cut_batch(leaf, value), strict=True)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, leaf.axis)


def _contract(coefficients: Array, value: Array) -> Array:
    """Weighted sum in which a zero coefficient removes even NaN (law: zero is absent).

    Full precision: accelerators would otherwise round the factors to bfloat16 or
    TF32, and the bound with them.
    """
    present = (coefficients != 0).reshape(-1, *[1] * (value.ndim - 1))
    clean = jnp.where(present, value, 0)
    weights = coefficients.astype(value.dtype)
    return jnp.tensordot(weights, clean, 1, precision=jax.lax.Precision.HIGHEST)
