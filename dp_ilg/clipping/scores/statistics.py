"""What a score may read of one example, and inner products with a public tree.

Inner products need no gradient of a single example: the weighted sum over examples is
linear in its coefficients, and its derivative with respect to the coefficient of one
example's group is the inner product of that group's gradient with what it is paired
with. One transposed pass gives all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg.base import Params, PerExampleGrads
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.clipping.purity import equations
from dp_ilg.geometry.geometry import Geometry


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a score reads of one example.

    Attributes:
        norms: L2 norm of its gradient in every group, float32 ``[groups]``; in the
            maps' coordinates, where the geometry has `dp_ilg.geometry.maps.AxisMaps`.
        sizes: number of parameters in every group, float32 ``[groups]``; public.
        lengths: maps a public tree, shaped like the parameters, to its L2 norm in every
            group, float32 ``[groups]``; of ``L^T tree`` where there is a map L, so that
            an inner product is at most its norm times this.
        inner: maps a public tree, shaped like the parameters, to the inner product of
            gradient and tree in every group, float32 ``[groups]``; maps do not change
            it. Computed only if it is called. The tree may be made of constants,
            `params` and `release`, not of `norms`.

    Privacy: raw values of one example; what a score makes of them is bounded, summed
    and noised before it leaves. `params` and `release` are earlier releases.

    Example:
        >>> one = Statistics(jnp.array([3.0, 4.0]), jnp.ones(2), inner=None)
        >>> [round(float(x), 2) for x in one.norms / jnp.sum(one.norms)]
        [0.43, 0.57]
    """

    norms: Any
    sizes: Any
    inner: Any
    lengths: Any = None
    _params: Any = None
    _release: Any = None

    @property
    def params(self) -> Params:
        """The parameters at which the gradient was taken."""
        if self._params is None:
            raise ValueError(
                "The score reads the parameters, but the clip was not given them; pass "
                "params to tx.update, or clip with dp_ilg.clipped_grad."
            )
        return self._params

    @property
    def release(self) -> Params:
        """The last released gradient r; zeros before the first.

        Where there is a map L it is ``L^-T L^-1 r``, the step along it in L's
        coordinates, so that products with it are those of ``L^-1 g`` and ``L^-1 r``.
        """
        if self._release is None:
            raise ValueError(
                "The score reads the last release, which the chain does not keep; give "
                "it as dp_ilg.clipping.scores.table.Score(function, "
                "reads_release=True), and put dp_ilg.optimizers.kept_release."
                "keep_release() behind the noise of a chain of your own."
            )
        return self._release


def inner_products(
    per_example: PerExampleGrads, tree: Params, geometry: Geometry
) -> Float[Array, "batch groups"]:
    """The inner product of every example's gradient with a tree, group by group.

    Args:
        per_example: what the engine found.
        tree: like the parameters.
        geometry: of the clip.

    Returns:
        float32 ``[batch, groups]``; not finite where an example's gradient is not.

    Raises:
        ValueError: for a tree of another shape, or a geometry that scales each entry
            by itself.

    Privacy: raw values, one a group and example. Under a map L of the leaves, which is
    public, ``<g, w> = <L^-1 g, L^T w>``, and ``L^-1 g`` is what the engine sums.

    Example:
        >>> from dp_ilg.clipping.per_example import from_gradients
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(1)}
        >>> geometry = Geometry.uniform(params)
        >>> gradients = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[2.0]])}
        >>> found = from_gradients(gradients, geometry.groups)
        >>> inner_products(found, params, geometry).tolist()
        [[7.0, 2.0]]
    """
    if geometry.coordinates is not None and not _has_maps(geometry):
        raise ValueError(
            "The score reads inner products, but the gradients are clipped with a "
            "centre and scale of every entry; leave these out, or take a score that "
            "reads norms only."
        )
    leaves = jax.tree.leaves(tree)
    geometry.groups.check(leaves)
    leaves = _paired(geometry, leaves)
    count = per_example.norms.shape[0], len(geometry.groups.names)

    def paired(coefficients: Array) -> Array:
        sums = jax.tree.leaves(per_example.weighted_sum(coefficients))
        facts = geometry.groups.leaves
        parts = [
            jnp.sum(widened(x) * widened(y))
            for x, y, leaf in zip(sums, leaves, facts, strict=True)
            if leaf.groups
        ]
        return sum(parts, jnp.zeros((), np.float64))

    with wide():
        start = jnp.ones(count, np.float32)
        _, pull = jax.vjp(paired, start)
        (found,) = pull(jnp.ones((), np.float64))
        return found


def vectors(
    function: Callable[[Statistics], Any],
    per_example: PerExampleGrads,
    norms: Float[Array, "batch groups"],
    geometry: Geometry,
) -> Float[Array, "batch groups"]:
    """What a score says of every example, before it is bounded.

    The score is called once to learn which inner products it asks for, and once for
    all examples at a time.

    Args:
        function: the score.
        per_example: what the engine found.
        norms: of every example and group; 0 for absent ones.
        geometry: of the clip.

    Returns:
        One vector an example, float32.

    Raises:
        ValueError: for a score that is no real vector ``[groups]``, branches on values,
            or prints or calls back to the host.

    Privacy: raw values; not bounded yet.

    Example:
        >>> from dp_ilg.clipping.per_example import from_gradients
        >>> geometry = Geometry.uniform({"a": jnp.ones(2), "b": jnp.ones(1)})
        >>> gradients = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[2.0]])}
        >>> found = from_gradients(gradients, geometry.groups)
        >>> vectors(lambda one: one.norms**2, found, found.norms, geometry).round(2)
        Array([[25.,  4.]], dtype=float32)
    """
    sizes = jnp.array(geometry.groups.sizes, jnp.float32)
    public = _lengths(geometry), per_example.params, _direction(geometry)
    asked: list[Any] = []

    def asks(tree: Any) -> Array:
        asked.append(tree)
        return jnp.ones_like(sizes)

    count = len(geometry.groups.names)
    _refuse_effects(function, public, sizes)
    checked(function, Statistics(jnp.ones_like(sizes), sizes, asks, *public), count)
    products = [inner_products(per_example, tree, geometry) for tree in asked]

    def one(norms: Array, *own: Array) -> Array:
        left = iter(own)
        own_statistics = Statistics(
            norms, sizes, lambda tree: next(left, None), *public
        )
        return checked(function, own_statistics, count)

    return jax.vmap(one)(norms.astype(jnp.float32), *products)


def _refuse_effects(
    function: Callable[[Statistics], Any], public: tuple, sizes: Array
) -> None:
    """Raises for a score that prints or calls back: single examples would be seen."""

    def of_norms(norms: Array) -> Array:
        one = Statistics(norms, sizes, lambda tree: norms, *public)
        return checked(function, one, len(sizes))

    closed = jax.make_jaxpr(of_norms)(np.ones(len(sizes), np.float32))
    kinds = {type(effect).__name__ for effect in closed.effects}
    names = {equation.primitive.name for equation in equations(closed.jaxpr)}
    found = sorted(kinds | {name for name in names if "callback" in name})
    if found:
        raise ValueError(
            f"The score has effects ({', '.join(found)}), which would show single "
            "examples; take jax.debug.print and callbacks out of it."
        )


def _lengths(geometry: Geometry) -> Callable[[Params], Array]:
    def lengths(tree: Params) -> Array:
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
        geometry.groups.check(leaves)
        leaves = _paired(geometry, leaves)
        return geometry.groups.norms(leaves).astype(jnp.float32)

    return lengths


def _paired(geometry: Geometry, leaves: list[Any]) -> list[Any]:
    """A public tree as gradients in the geometry's coordinates pair with it."""
    maps: Any = geometry.coordinates
    return maps.paired(leaves) if _has_maps(geometry) else leaves


def _has_maps(geometry: Geometry) -> bool:
    return hasattr(geometry.coordinates, "paired")


def _direction(geometry: Geometry) -> Params | None:
    """The last release, as the step along it; see `Statistics.release`."""
    if geometry.release is None or not _has_maps(geometry):
        return geometry.release
    maps: Any = geometry.coordinates
    leaves, treedef = jax.tree.flatten(geometry.release)
    return jax.tree.unflatten(treedef, maps.steps(geometry.unrestored(leaves)))


def checked(
    function: Callable[[Statistics], Any], statistics: Statistics, count: int
) -> Array:
    """Calls a score and raises, in a sentence, unless it gives one vector.

    Args:
        function: the score.
        statistics: of one example.
        count: number of groups.

    Returns:
        The vector, float32 ``[groups]``.

    Raises:
        ValueError: for anything else, and for a score that branches on values.

    Example:
        >>> one = Statistics(jnp.ones(3), jnp.ones(3), inner=None)
        >>> checked(lambda one: one.norms[0], one, 3)
        Traceback (most recent call last):
        ValueError: The score of one example is float32 of shape (), but must be real \
numbers of shape (3,), one a group.
    """
    try:
        found = function(statistics)
    except jax.errors.ConcretizationTypeError:
        raise ValueError(
            "The score branches on values of an example, which are not known when it "
            "is compiled; write jnp.where(condition, this, that)."
        ) from None
    leaves = jax.tree.leaves(found)
    value = jnp.asarray(leaves[0]) if len(leaves) == 1 else None
    if value is None or not hasattr(found, "dtype"):
        raise ValueError(
            f"The score of one example is {type(found).__name__}, but must be one "
            f"array of shape ({count},), a number a group."
        )
    real = jnp.issubdtype(value.dtype, jnp.floating)
    if value.shape != (count,) or not real:
        raise ValueError(
            f"The score of one example is {value.dtype} of shape {value.shape}, but "
            f"must be real numbers of shape ({count},), one a group."
        )
    return value.astype(jnp.float32)
