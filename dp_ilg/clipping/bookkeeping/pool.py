"""Small formed gradients side by side, so that a few operations serve them all.

A model has dozens of biases and scales. Norm and sum of each on its own would be
several small kernels a leaf, which cost more to compile and to start than to run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.clipping.adding.sums import Weighted, over_examples, widened
from dp_ilg.clipping.per_example import leaf_terms
from dp_ilg.geometry.groups import (
    Groups,
    LeafGroups,
    accumulator,
    cut_batch,
    pieces_of,
    scaled_norms,
)
from dp_ilg.geometry.rounding import power_of_two, upwards

LARGEST = 8192
"""Entries of the largest leaf that is pooled."""

POOL_ROUNDINGS = 10
"""Roundings in a norm of the pool: see docs/rounding.md, "Pooled leaves"."""
_GRID = 2.0**22  # of which float32 holds 4 exactly: sums of shares reach 1
_EXACT = jax.lax.Precision.HIGHEST


class Pool(NamedTuple):
    """The gradients of several leaves, scaled, as one matrix.

    Attributes:
        leaves: which leaves, in the order of the columns.
        owners: the group of every column.
        values: ``[examples, columns]``, divided by `scale`.
        scale: ``[examples]``; NaN for an example that is not finite.
    """

    leaves: tuple[int, ...]
    owners: np.ndarray
    values: Array
    scale: Array

    def norms(self) -> tuple[Array, list[int]]:
        """Norm of every group there is, never below it, and which groups they are."""
        found = sorted({int(g) for g in self.owners})
        squares = grouped_sums(jnp.square(self.values), self.owners)
        member = np.equal.outer(self.owners, found).astype(self.values.dtype)
        there = jnp.matmul((self.values != 0).astype(self.values.dtype), member) > 0
        floor = 1e8 * jnp.finfo(squares.dtype).tiny
        root = upwards(jnp.sqrt(squares + floor), POOL_ROUNDINGS)
        root = jnp.where(there, root, 0)
        scale = self.scale[:, None]
        return jnp.where(scale == 0, 0, scale * root), found

    def sums(self, coefficients: Array, groups: Groups) -> dict[int, Array]:
        """Weighted sum of every leaf; a coefficient of 0 removes its example."""
        scale = self.scale.reshape(-1, *[1] * (coefficients.ndim - 1))
        present = (coefficients != 0) & jnp.isfinite(scale)
        zero = np.float64(0)
        weights = jnp.where(present, widened(coefficients) * widened(scale), zero)
        if weights.ndim == 2:
            weights = weights[:, self.owners]
        (total,) = over_examples(Weighted(weights, self.values))
        shapes = [groups.leaves[k].shape for k in self.leaves]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = jnp.split(total, ends)
        return {
            k: part.reshape(shape)
            for k, part, shape in zip(self.leaves, parts, shapes, strict=True)
        }


def grouped_sums(values: Array, owners: np.ndarray) -> Array:
    """Sums of the columns of each group, for terms that are not negative.

    A plain product with the groups' indicator adds one after the other and loses small
    terms on large ones: squared norms of 8,192 entries came out 2.6e-5 too low, which
    broke the bound. Shares of that rough sum, cut to a grid of 2^-22, add up without
    any rounding; what the grid cuts off is small, and its own rounding is added back.

    Args:
        values: ``[examples, columns]``, below 4.
        owners: the group of every column.

    Returns:
        ``[examples, groups]``, groups in ascending order; too small by six roundings
        at most.

    Example:
        >>> grouped_sums(jnp.arange(6.0)[None], np.array([0, 0, 1, 0, 1, 1])).tolist()
        [[4.0, 11.0]]
    """
    dtype = values.dtype
    member = np.equal.outer(owners, sorted(set(owners.tolist()))).astype(dtype)
    added = lambda x, by: jnp.matmul(x, by, precision=_EXACT)  # noqa: E731
    rough = jnp.maximum(added(values, member), 1e6 * jnp.finfo(dtype).tiny)
    shares = values * added(1 / rough, member.T)
    whole = jnp.floor(shares * _GRID) / _GRID
    sums, rest = added(jnp.stack([whole, shares - whole]), member)
    lost = member.sum(axis=0) * jnp.finfo(dtype).eps
    return rough * (sums + rest * (1 + lost))


def pool(groups: Groups, formed: dict[int, Array]) -> Pool | None:
    """Pools the small leaves among formed per-example gradients.

    Args:
        groups: the groups of the parameters.
        formed: per-example gradients by leaf.

    Returns:
        The pool, or None where no leaf is small.
    """
    small = [k for k, value in formed.items() if math.prod(value.shape[1:]) <= LARGEST]
    if not small:
        return None
    wide = accumulator(jnp.result_type(*[formed[k] for k in small]))
    columns = [
        formed[k].reshape(formed[k].shape[0], math.prod(formed[k].shape[1:]))
        for k in small
    ]
    values = jnp.concatenate([x.astype(wide) for x in columns], axis=1)
    top = power_of_two(jnp.max(jnp.abs(values), axis=1, initial=0))
    tiny = jnp.finfo(wide).tiny
    present = (top >= tiny) & (top * tiny < 1)
    factor = jnp.where(present, 1 / jnp.where(present, top, 1), 0)[:, None]
    values = jnp.where(present[:, None], values * factor, 0)
    scale = jnp.where(present, top, jnp.where(top < tiny, 0, jnp.nan))
    owners = np.concatenate([_owners(groups.leaves[k]) for k in small])
    return Pool(tuple(small), owners, values, scale)


def _owners(leaf: LeafGroups) -> np.ndarray:
    """The group of every entry of a leaf, flat."""
    pieces = pieces_of(leaf)
    if not leaf.edges:
        return np.full(math.prod(leaf.shape), pieces[0][2])
    along = np.repeat([g for _, _, g in pieces], np.diff(leaf.edges))
    shape = [1] * len(leaf.shape)
    shape[leaf.axis] = leaf.shape[leaf.axis]
    return np.broadcast_to(along.reshape(shape), leaf.shape).reshape(-1)


class General(NamedTuple):
    """Leaves whose per-example gradients were formed: small ones pooled, the rest."""

    groups: Groups
    small: Pool | None
    large: dict[int, Array]

    @classmethod
    def of(cls, groups: Groups, formed: dict[int, Array]) -> General:
        """Sorts formed gradients, by leaf, into small and large ones."""
        small = pool(groups, formed)
        taken = small.leaves if small else ()
        return cls(groups, small, {k: v for k, v in formed.items() if k not in taken})

    def norms(self) -> tuple[list[Array], list[int]]:
        """Norms of all pieces, and the group of each."""
        columns: list[Array] = []
        owners: list[int] = []
        if self.small is not None:
            found, owners = self.small.norms()
            columns.append(found)
        pieces: list[Array] = []
        for k, value in self.large.items():
            pieces += cut_batch(self.groups.leaves[k], value)
            owners += [group for _, _, group in pieces_of(self.groups.leaves[k])]
        return columns + ([scaled_norms(pieces)] if pieces else []), owners

    def sums(self, coefficients: Array) -> dict[int, Array]:
        """Weighted sum of every leaf."""
        small = self.small.sums(coefficients, self.groups) if self.small else {}
        leaves = self.groups.leaves
        terms = [
            leaf_terms(leaves[k], value, coefficients)
            for k, value in self.large.items()
        ]
        return small | dict(zip(self.large, over_examples(*terms), strict=True))
