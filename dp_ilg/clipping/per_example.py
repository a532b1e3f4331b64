"""The reference engine: per-example gradients by ``jax.vmap``.

Slow and obvious, it is the oracle of every faster engine. An engine maps
``(loss_fn, params, batch, groups)`` to `PerExampleGrads`, in the manner of
``jax.vjp``: numbers and a closure.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads, PyTree
from dp_ilg.clipping.adding.sums import Weighted, over_examples, wide, widened
from dp_ilg.geometry.groups import Groups, LeafGroups, check_batch_axis


def vmap_engine(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> PerExampleGrads:
    """Instantiates every example's gradient with ``jax.vmap(jax.grad(loss_fn))``.

    Args:
        loss_fn: ``(params, example) -> scalar`` for one example.
        params: any tree of floating-point arrays.
        batch: the same tree as an example, with a leading batch axis.
        groups: the groups of `params`.
        coordinates: None, or what gradients are mapped by, as in a `Geometry`.

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
    gradients, values = _differentiated(loss_fn, params, batch, coordinates)
    return from_gradients(gradients, groups)._replace(metrics=values)


def exact_engine(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> PerExampleGrads:
    """As `vmap_engine`, with every clipped example rounded onto the public grid.

    Each entry of each clipped gradient is rounded towards zero to a multiple of the
    step, which can only shorten it; from there on all are whole numbers. No rounding is
    left in how far two sums can be apart, and none depends on the rest of the batch.

    Args:
        loss_fn: ``(params, example) -> scalar`` for one example.
        params: any tree of floating-point arrays.
        batch: the same tree as an example, with a leading batch axis.
        groups: the groups of `params`.
        coordinates: None, or what gradients are mapped by, as in a `Geometry`.

    Returns:
        Norms and the weighted sum; memory is batch times parameters.

    Privacy: raw values, see `PerExampleGrads`. The sum of clipped examples has
    sensitivity at most C, without any allowance for adding.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"w": jnp.ones(2)}
        >>> loss = lambda p, x: jnp.sum(p["w"] * x)
        >>> found = exact_engine(loss, params, jnp.array([[3.3, 4.7]]), group(params))
        >>> found.weighted_sum(jnp.ones(1), jnp.ones(1))["w"].tolist()
        [3.0, 4.0]
    """
    gradients, values = _differentiated(loss_fn, params, batch, coordinates)
    return from_gradients(gradients, groups, True)._replace(metrics=values)


def _differentiated(
    loss_fn: LossFn, params: Params, batch: Example, coordinates: Any
) -> tuple[PyTree, Any]:
    """Every example's gradient, and what its loss gives beside the value, or None."""

    def parts(params: Params, example: Example) -> tuple[Any, list[Any]]:
        loss, *values = jax.tree.leaves(loss_fn(params, example))
        return loss, values

    graded = jax.vmap(jax.grad(parts, has_aux=True), (None, 0))
    gradients, values = graded(params, batch)
    if coordinates is not None:
        leaves, treedef = jax.tree.flatten(gradients)
        gradients = jax.tree.unflatten(treedef, coordinates.entered(leaves))
    return gradients, values[0] if values else None


def from_gradients(
    gradients: PyTree, groups: Groups, truncated: bool = False
) -> PerExampleGrads:
    """Norms and weighted sum of gradients that are already there.

    Args:
        gradients: like the parameters, each leaf with a leading batch axis.
        groups: the groups of the parameters.
        truncated: whether each example is rounded towards zero onto the public grid.

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

    def weighted_sum(coefficients: Array, steps: Any = None) -> Params:
        units: list[Any] = [None] * len(leaves)
        if steps is not None and truncated:
            units = groups.expand(steps)
        taken = [k for k, leaf in enumerate(groups.leaves) if leaf.groups]
        with wide():
            sums = [jnp.zeros(leaf.shape, np.float64) for leaf in groups.leaves]
            found = over_examples(
                *[
                    leaf_terms(groups.leaves[k], leaves[k], coefficients, units[k])
                    for k in taken
                ]
            )
        for k, total in zip(taken, found, strict=True):
            sums[k] = total
        return jax.tree.unflatten(treedef, sums)

    return PerExampleGrads(norms, weighted_sum, norms)


def leaf_terms(
    leaf: LeafGroups, value: Array, coefficients: Array, step: Any = None
) -> Weighted:
    """Coefficients times gradients of one leaf that is not frozen, to be added up.

    Args:
        leaf: the leaf's groups.
        value: its gradients, ``[examples, ...]``.
        coefficients: ``[examples]`` or ``[examples, groups]``.
        step: None, or to what each example is rounded.

    Returns:
        What `sums.over_examples` adds up; call this in the context `sums.wide`.
    """
    weights = widened(coefficients)
    if weights.ndim == 1:
        return Weighted(weights, value, step)
    if not leaf.edges:
        return Weighted(weights[:, leaf.groups[0]], value, step)
    shape = [1] * len(leaf.shape)
    shape[leaf.axis] = leaf.shape[leaf.axis]
    owners = np.repeat(np.array(leaf.groups), np.diff(leaf.edges))
    return Weighted(weights[:, owners].reshape(-1, *shape), value, step)
