"""One linear map a leaf, axis by axis, in whose coordinates a gradient is clipped.

A `dp_ilg.Geometry` weighs groups. With `AxisMaps` it also turns and stretches every
leaf by a public map L: an example is clipped by the length of ``L^-1 g``, and noise is
shaped by L. A scale per row of an embedding, per input feature, or a Kronecker pair
``A (x) B`` of a matrix are all products of one factor an axis.

Why no proof changes: the values that are clipped, added and noised are the computed
floats ``L^-1 g`` of every example. Their norm and their sum are made of the same
floats, so the bounds on norms (docs/rounding.md) and the grid of sums (docs/sums.md)
hold for them as they stand, however `into` was rounded. What comes after the noise is
post-processing, so that `back` need not even be its exact inverse.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dp_ilg.base import PyTree, own_promotion
from dp_ilg.geometry.axis_factors import inverse_pair
from dp_ilg.geometry.groups import Groups, accumulator, pieces_of
from dp_ilg.geometry.layers import Path, matches, paths

Factors = tuple[Any, ...]
"""One factor an axis of a leaf: None, a vector ``[n]`` or a matrix ``[n, n]``."""
_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AxisMaps:
    """A linear map of every leaf, as one factor an axis, and its inverse.

    Attributes:
        into: for each leaf its `Factors`, by which a per-example gradient is multiplied
            before it is clipped: ``L^-1``.
        back: the same for L, by which a released mean is multiplied.
        whitened: what the optimizer is given. False: ``L mean``, an ordinary gradient,
            unbiased where nothing is clipped, whose noise has the shape of L. True: the
            mean of ``L^-1 g`` itself, and `dp_ilg.optimizers.whitened.unwhiten_updates`
            behind the optimizer multiplies its *update* by ``L^-1`` transposed. That is
            training in z, with ``w = w0 + L^-T z``: exactly what scaling the features
            of a linear model by 1/b does. Under plain SGD the first moves w by ``g``
            and the second by ``L^-T L^-1 g``, a preconditioned step; under Adam, which
            ignores scales, the first undoes L entry by entry, and the second makes
            steps of size 1/b.

    Privacy: factors must be public facts or functions of earlier releases; any will
    do. Each step is then the plan's Gaussian in the coordinates ``L^-1 g``, for adding
    or removing one example.

    Example:
        >>> import dp_ilg
        >>> params = {"w": jnp.ones((2, 3))}
        >>> maps = AxisMaps.of(params, {"w": (jnp.array([1.0, 2.0]), None)})
        >>> inside = maps.entered([jnp.ones((2, 3))])
        >>> inside[0].tolist(), maps.restored(inside)[0].tolist()
        ([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
        >>> groups = dp_ilg.layers.group(params)
        >>> geometry = dp_ilg.Geometry(jnp.ones(1), groups, maps)
        >>> round(float(geometry.noise_scale()[0]), 4)  # the root of (1 + 4) / 2
        1.5811

    Reference: Pichapati et al. 2019 (scales of entries); Gupta et al. 2018 (Shampoo)
    for the Kronecker pair; docs/idea.md, "Any linear map".
    """

    into: tuple[Factors, ...]
    back: tuple[Factors, ...]
    whitened: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    @own_promotion
    def of(
        cls,
        params: PyTree,
        axes: Mapping[str, Any],
        *,
        power: float = 1.0,
        whitened: bool = False,
    ) -> AxisMaps:
        """Maps from public scales b, or symmetric positive matrices, an axis each.

        Args:
            params: the parameter tree.
            axes: name of a leaf, as in `dp_ilg.layers.blocks`, to one entry an axis:
                None, a scale ``[n]`` or a matrix ``[n, n]``. A leaf of one axis may
                have the entry alone. Leaves without a name stay as they are.
            power: L is this power of what is given: 1/2 for second moments.
            whitened: see the class.

        Returns:
            The maps, in float32; `back` is the power, `into` its inverse (in float64
            where the values are known). Traced values that are no positive finite
            numbers, or that are less than a 10,000th of the largest, are raised to it.

        Raises:
            ValueError: for a name without a leaf, another shape than the axis, values
                that are not positive and finite, a matrix that is not symmetric, and
                where largest and smallest are more than a factor of 10,000 apart.

        Privacy: the values must be public facts or functions of earlier releases.

        Example:
            >>> params = {"w": jnp.ones((2, 1))}
            >>> maps = AxisMaps.of(params, {"w": (4 * jnp.eye(2), None)}, power=0.5)
            >>> maps.back[0][0].tolist(), maps.into[0][0].tolist()
            ([[2.0, 0.0], [0.0, 2.0]], [[0.5, 0.0], [0.0, 0.5]])
        """
        leaves = paths(params)
        lost = [n for n in axes if not any(matches(n, path) for path, _ in leaves)]
        if lost:
            known = ["/".join(path) for path, _ in leaves]
            raise ValueError(f"No parameter matches {lost[0]!r}; there are {known}.")
        pairs = [_pairs(path, x.shape, axes, power) for path, x in leaves]
        into, back = (tuple(own[k] for own in pairs) for k in (0, 1))
        return cls(into, back, whitened)

    @own_promotion
    def entered(self, leaves: Sequence[Any]) -> list[Array]:
        """Per-example gradients, or one gradient, in these coordinates."""
        pairs = enumerate(leaves)
        return [self.entered_leaf(k, x) for k, x in pairs]

    @own_promotion
    def entered_leaf(self, index: int, value: Any) -> Array:
        """The same of one leaf."""
        return multiplied(wide(value), self.into[index])

    def axis_kinds(self) -> list[tuple[int, ...]]:
        """For each leaf's axes 0 (it stays), 1 (a scale) or 2 (a matrix)."""
        return [tuple(0 if f is None else f.ndim for f in own) for own in self.into]

    @own_promotion
    def restored(self, leaves: Sequence[Array]) -> list[Array]:
        """A released mean, as the optimizer is to see it."""
        if self.whitened:
            return list(leaves)
        return [multiplied(x, own) for x, own in zip(leaves, self.back, strict=True)]

    @own_promotion
    def steps(self, leaves: Sequence[Any]) -> list[Array]:
        """A step z in these coordinates as a step of the parameters: ``L^-T z``."""
        pairs = zip(leaves, self.into, strict=True)
        return [multiplied(wide(z), own, transposed=True) for z, own in pairs]

    @own_promotion
    def paired(self, leaves: Sequence[Any]) -> list[Array]:
        """A tree like the parameters w as gradients here pair with it: ``L^T w``.

        Then ``<L^-1 g, L^T w>`` is ``<g, w>``; it undoes `steps`.
        """
        pairs = zip(leaves, self.back, strict=True)
        return [multiplied(wide(w), own, transposed=True) for w, own in pairs]

    @own_promotion
    def noise_squares(self, groups: Groups) -> Float[Array, " groups"]:
        """Mean square of the noise of each group on the release, at weights 1."""
        count = len(groups.names)
        if self.whitened:
            return jnp.ones(count, jnp.float32)
        sums = jnp.zeros(count, jnp.float32)
        for leaf, own in zip(groups.leaves, self.back, strict=True):
            rows = [_row_squares(f, n) for f, n in zip(own, leaf.shape, strict=True)]
            size = math.prod(leaf.shape)
            for start, stop, owner in pieces_of(leaf):
                share, means = 1.0, [jnp.mean(x) for x in rows]
                if leaf.edges:
                    share = (stop - start) / leaf.shape[leaf.axis]
                    means[leaf.axis] = jnp.mean(rows[leaf.axis][start:stop])
                mean = functools.reduce(jnp.multiply, means, jnp.float32(1))
                sums = sums.at[owner].add(size * share * mean.astype(jnp.float32))
        return sums / jnp.array(groups.sizes, jnp.float32)

    def check(self, groups: Groups) -> None:
        """Raises unless these are maps of such leaves that mix no two groups.

        Raises:
            ValueError: for factors of other shapes, or a matrix along the axis that a
                leaf is cut into groups.
        """
        if len(self.into) != len(groups.leaves):
            raise ValueError(
                f"There are maps of {len(self.into)} leaves, but the model has "
                f"{len(groups.leaves)}; make them with AxisMaps.of(params, ...)."
            )
        for leaf, own in zip(groups.leaves, self.into, strict=True):
            sizes = [None if f is None else tuple(f.shape) for f in own]
            fits = len(sizes) == len(leaf.shape) and all(
                size in (None, (n,), (n, n))
                for size, n in zip(sizes, leaf.shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"The maps of {leaf.path} have the shapes {sizes}, but the leaf "
                    f"has {leaf.shape}; make them with AxisMaps.of(params, ...)."
                )
            if len(set(leaf.groups)) > 1:
                _check_cut(leaf.path, leaf.axis, sizes)


def wide(value: Any) -> Array:
    """A gradient in float32 or wider, where maps act.

    Example:
        >>> str(wide(jnp.ones(2, jnp.bfloat16)).dtype)
        'float32'
    """
    value = jnp.asarray(value)
    return value.astype(accumulator(value.dtype))


def multiplied(value: Array, factors: Factors, transposed: bool = False) -> Array:
    """A leaf, behind any batch axes, multiplied along each of its own axes.

    Args:
        value: float32 or wider.
        factors: one an axis of the leaf.
        transposed: whether matrices are.

    Returns:
        The product, of the same shape.

    Example:
        >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> multiplied(jnp.array([[1.0, 2.0]]), (swap,)).tolist()
        [[2.0, 1.0]]
    """
    batch = value.ndim - len(factors)
    for axis, factor in enumerate(factors):
        if factor is not None:
            value = along(value, factor, batch + axis, transposed)
    return value


def along(value: Array, factor: Array, axis: int, transposed: bool = False) -> Array:
    """Multiplies one axis of an array by a vector or a matrix.

    Args:
        value: float32 or wider.
        factor: ``[n]`` or ``[n, n]``.
        axis: of length n.
        transposed: whether the matrix is.

    Returns:
        The product, in the dtype of `value`.

    Example:
        >>> along(jnp.ones((2, 3)), jnp.array([1.0, 2.0]), 0)[:, 0].tolist()
        [1.0, 2.0]
    """
    factor = jnp.asarray(factor).astype(value.dtype)
    if factor.ndim == 1:
        shape = [1] * value.ndim
        shape[axis] = factor.shape[0]
        return value * factor.reshape(shape)
    own = 0 if transposed else 1
    found = jnp.tensordot(value, factor, ((axis,), (own,)), precision=_EXACT)
    return jnp.moveaxis(found, -1, axis)


def _row_squares(factor: Any, size: int) -> Array:
    """What independent noise of variance 1 becomes along an axis, entry by entry."""
    if factor is None:
        return jnp.ones(size, jnp.float32)
    squares = jnp.square(factor)
    return squares if squares.ndim == 1 else jnp.sum(squares, axis=1)


def _pairs(
    path: Path, shape: tuple[int, ...], axes: Mapping[str, Any], power: float
) -> tuple[Factors, Factors]:
    """What `AxisMaps` holds of one leaf."""
    text = "/".join(path)
    name = next((n for n in axes if matches(n, path)), None)
    given = [None] * len(shape) if name is None else _entries(text, axes[name], shape)
    made = [
        inverse_pair(f"{text}, axis {k},", value, size, power)
        for k, (value, size) in enumerate(zip(given, shape, strict=True))
    ]
    return tuple(one for one, _ in made), tuple(other for _, other in made)


def _entries(path: str, given: Any, shape: tuple[int, ...]) -> Sequence[Any]:
    """One entry an axis, however it was given."""
    if not isinstance(given, tuple | list):
        given = (given,)
    if len(given) != len(shape):
        raise ValueError(
            f"The map of {path} has {len(given)} entries, but the leaf has "
            f"{len(shape)} axes; give one an axis, None where it stays."
        )
    return given


def _check_cut(path: str, axis: int, sizes: list[Any]) -> None:
    if sizes[axis] is not None and len(sizes[axis]) == 2:
        raise ValueError(
            f"A matrix along axis {axis} of {path} would mix the groups it is cut into "
            "along that axis; give a scale there, or cut another axis."
        )
