"""Groups of parameters: values per group to leaves, leaves to norms per group.

Groups are static facts: hashable, kept in the tree structure and never in arrays,
so that no shape depends on data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg.geometry.rounding import additions, power_of_two, total, upwards


@dataclass(frozen=True)
class LeafGroups:
    """One leaf: its blocks along `axis` and the group of each.

    `edges` is empty for a whole leaf; `groups` is empty for a frozen one.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    edges: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """The groups of one parameter tree, in the order of its leaves.

    Attributes:
        names: one name a group.
        sizes: number of parameters in each group.
        leaves: how each leaf divides into groups.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    leaves: tuple[LeafGroups, ...]

    def expand(self, values: Float[Array, " groups"]) -> list[Array]:
        """One array a leaf, broadcastable against it; 0 on frozen leaves."""
        return [_expand(leaf, values) for leaf in self.leaves]

    def norms(self, leaves: Sequence[Array]) -> Float[Array, " groups"]:
        """L2 norm of each group of one tree, given its leaves.

        Every piece is scaled by its largest entry first, so nothing finite over- or
        underflows in float32 (law: norms in float32). NaN and infinity give NaN or
        infinity.
        """
        return self.batch_norms([x[None] for x in leaves])[0]

    def batch_norms(self, leaves: Sequence[Array]) -> Float[Array, "batch groups"]:
        """The same for every example of leaves with a leading batch axis."""
        pieces: list[Array] = []
        owners: list[int] = []
        for leaf, value in zip(self.leaves, leaves, strict=True):
            pieces += cut_batch(leaf, value)
            owners += [group for _, _, group in pieces_of(leaf)]
        return join_norms(scaled_norms(pieces), np.array(owners), len(self.names))

    def check(self, leaves: Sequence[Any], batch_axes: int = 0) -> None:
        """Raises unless the leaves have the shapes these groups were made for."""
        got = [tuple(x.shape[batch_axes:]) for x in leaves]
        want = [leaf.shape for leaf in self.leaves]
        if got != want:
            pairs = zip(self.leaves, got, want, strict=False)
            bad = [f"{p.path} {g} for {w}" for p, g, w in pairs if g != w]
            raise ValueError(
                f"The arrays do not fit the geometry's parameters ({len(got)} "
                f"leaves for {len(want)}{'; ' + bad[0] if bad else ''}); use the "
                "geometry of the same model."
            )


def accumulator(dtype: Any) -> Any:
    """The dtype in which norms and sums of `dtype` are held: float32 or wider.

    Example:
        >>> str(accumulator("bfloat16"))
        'float32'
    """
    return jnp.promote_types(dtype, jnp.float32)


def group_sizes(leaves: Sequence[LeafGroups], count: int) -> tuple[int, ...]:
    """Number of parameters in each of `count` groups."""
    sizes = [0] * count
    for leaf in leaves:
        total = math.prod(leaf.shape)
        for start, stop, owner in pieces_of(leaf):
            width = leaf.shape[leaf.axis] if leaf.edges else 1
            sizes[owner] += total * (stop - start) // width if leaf.edges else total
    return tuple(sizes)


def scaled_norms(values: Sequence[Array]) -> Float[Array, "batch pieces"]:
    """L2 norm of every example of every array, and never below it (docs/rounding.md).

    Scaled by powers of two against over- and underflow, which rounds nothing. Where the
    largest entry exceeds about 8e37 (float32) the reciprocal would be flushed to zero;
    the norm is then NaN, and the example absent.

    Args:
        values: arrays with a leading batch axis.

    Returns:
        One column an array; float32 or wider. Above the norm by less than 1e-5 of it;
        below it only where all entries are denormal, which count as zero.

    Example:
        >>> import jax.numpy as jnp
        >>> bool(jnp.allclose(scaled_norms([jnp.array([[3e30, 4e30]])]), 5e30))
        True
    """
    sizes = [(x.shape[0], math.prod(x.shape[1:])) for x in values]
    flat = [
        x.reshape(size).astype(accumulator(x.dtype))
        for x, size in zip(values, sizes, strict=True)
    ]
    tops = jnp.stack([jnp.max(jnp.abs(x), axis=1, initial=0) for x in flat], axis=1)
    scale = nonzero(power_of_two(tops))
    factors = 1 / scale
    roots = []
    for k, (x, (_, count)) in enumerate(zip(flat, sizes, strict=True)):
        unit = x * factors[:, k, None].astype(x.dtype)
        root = jnp.sqrt(total(jnp.square(unit)))
        roots.append(upwards(root, (additions(count) + 1) / 2 + 2))
    return trusted(scale) * jnp.stack(roots, axis=1)


def cut_batch(leaf: LeafGroups, value: Array) -> list[Array]:
    """Every piece of a leaf with a leading batch axis, in the order of `pieces_of`."""
    if not leaf.edges:
        return [value] if leaf.groups else []
    return [
        jax.lax.slice_in_dim(value, start, stop, axis=1 + leaf.axis)
        for start, stop, _ in pieces_of(leaf)
    ]


def weighted_norm(
    norms: Float[Array, "... groups"], weights: Float[Array, " groups"]
) -> Float[Array, "..."]:
    """``sqrt(sum_j norms_j^2 / weights_j^2)``, scaled against over- and underflow.

    As computed: `rounding.weighted_norm_rounding` bounds what it may be too small by.

    Example:
        >>> import jax.numpy as jnp
        >>> float(weighted_norm(jnp.array([3.0, 8.0]), jnp.array([1.0, 2.0])))
        5.0
    """
    relative = norms / weights
    scale = nonzero(jnp.max(relative, axis=-1, keepdims=True))
    squares = total(jnp.square(relative / scale))
    return trusted(scale[..., 0]) * jnp.sqrt(squares)


def join_norms(
    pieces: Float[Array, "*batch pieces"], owners: np.ndarray, count: int
) -> Float[Array, "*batch groups"]:
    """Norm of each group from the norms of its pieces, and never below it.

    Args:
        pieces: the norms.
        owners: the group of every piece.
        count: number of groups.

    Returns:
        One norm a group; 0 for a group without pieces.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> found = join_norms(jnp.array([3.0, 4.0, 2.0]), np.array([0, 0, 1]), 2)
        >>> [round(x, 4) for x in found.tolist()]
        [5.0, 2.0]
    """
    if not len(owners):
        return jnp.zeros((*pieces.shape[:-1], count), pieces.dtype)
    places = [np.flatnonzero(owners == group) for group in range(count)]
    width = max(1, *map(len, places))
    index = np.array([np.resize(np.append(p, [0] * width), width) for p in places])
    there = np.arange(width) < np.array([[len(p)] for p in places])
    own = jnp.where(there, pieces[..., index], 0)
    if width == 1:
        return trusted(own[..., 0])
    scale = nonzero(jnp.max(own, axis=-1))
    root = jnp.sqrt(total(jnp.square(own / scale[..., None])))
    return trusted(scale) * upwards(root, (additions(width) + 1) / 2 + 4)


def nonzero(scale: Array) -> Array:
    """`scale`, or 1 where it is zero or denormal (which a device may flush)."""
    return jnp.where(scale < jnp.finfo(scale.dtype).tiny, 1.0, scale)


def trusted(scale: Array) -> Array:
    """`scale`, or NaN above about 8e37 in float32.

    There the reciprocal is denormal; a device that flushes it would report a norm of
    zero for a huge gradient, and leave it unclipped. NaN makes the example absent.
    """
    return jnp.where(scale * jnp.finfo(scale.dtype).tiny < 1, scale, jnp.nan)


def _expand(leaf: LeafGroups, values: Array) -> Array:
    if not leaf.groups:
        return jnp.zeros((), values.dtype)
    if not leaf.edges:
        return values[leaf.groups[0]]
    counts = np.diff(leaf.edges)
    rows = np.repeat(np.array(leaf.groups), counts)
    shape = [1] * len(leaf.shape)
    shape[leaf.axis] = leaf.shape[leaf.axis]
    return values[rows].reshape(shape)


def pieces_of(leaf: LeafGroups) -> list[tuple[int, int, int]]:
    """(start, stop, group) of every piece of a leaf; none if it is frozen."""
    if not leaf.edges:
        return [(0, 0, g) for g in leaf.groups]
    return list(zip(leaf.edges, leaf.edges[1:], leaf.groups, strict=False))


def check_batch_axis(leaves: list[Any], groups: Groups) -> None:
    """Raises unless every leaf is its parameter with one common leading axis."""
    for leaf, facts in zip(leaves, groups.leaves, strict=False):
        if tuple(leaf.shape) == facts.shape:
            raise ValueError(
                f"The gradient of {facts.path} has shape {facts.shape}, which is the "
                "parameter's own: it has no batch axis; pass per-example gradients, "
                "jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)."
            )
    groups.check(leaves, batch_axes=1)
    sizes = sorted({leaf.shape[0] for leaf in leaves})
    if len(sizes) > 1:
        raise ValueError(
            f"The per-example gradients have batch axes of unequal length {sizes}; "
            "each leaf must hold the same examples."
        )
