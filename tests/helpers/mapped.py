"""Random maps of a model, and clipped sums in their coordinates, by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.geometry.layers import paths
from dp_ilg.geometry.maps import AxisMaps
from tests.helpers.agreement import (
    ENGINE,
    QUICK,
    Outcome,
    assert_agree,
    clipped_by_hand,
    geometry_of,
)
from tests.zoo.core import Case

KINDS = {"scales": [1], "matrices": [2], "mixed": [0, 1, 2]}


def matrix(rng: Any, size: int) -> np.ndarray:
    """Symmetric, with eigenvalues from 0.3 to about 4."""
    root = rng.normal(size=(size, size))
    return root @ root.T / size + 0.3 * np.eye(size)


def random_axes(params: Any, kind: str, seed: int = 0) -> dict[str, Any]:
    """For every leaf one entry an axis, as `AxisMaps.of` takes them."""
    rng = np.random.default_rng(seed)

    def entry(size: int) -> Any:
        made = [None, rng.uniform(0.3, 3, size), matrix(rng, size)]
        return made[rng.choice(KINDS[kind])]

    return {"/".join(path): tuple(map(entry, x.shape)) for path, x in paths(params)}


def random_maps(params: Any, kind: str = "mixed", seed: int = 0) -> AxisMaps:
    """Maps of every leaf."""
    return AxisMaps.of(params, random_axes(params, kind, seed))


def entered_by_hand(gradients: Any, maps: AxisMaps) -> Any:
    """Per-example gradients times ``L^-1``, in NumPy and float64, by ``np.einsum``."""
    leaves, treedef = jax.tree.flatten(gradients)
    out = []
    for value, own in zip(leaves, maps.into, strict=True):
        made = np.asarray(value, np.float64)
        for axis, factor in enumerate(own, start=1):
            if factor is not None:
                square = np.asarray(factor, np.float64)
                square = np.diag(square) if square.ndim == 1 else square
                made = np.moveaxis(
                    np.tensordot(made, square, ((axis,), (1,))), -1, axis
                )
        out.append(made)
    return jax.tree.unflatten(treedef, out)


def compare_mapped(case: Case, maps: AxisMaps, tolerance: float = 1e-5) -> None:
    """Compares raw norms and the sum clipped at the median norm, by leaf."""
    geometry = geometry_of(case.params)
    gradient = jax.vmap(jax.grad(case.loss), (None, 0))
    found = jax.jit(gradient, compiler_options=QUICK)(case.params, case.batch)
    mapped = entered_by_hand(found, maps)
    want, coefficients = clipped_by_hand(mapped, np.asarray(geometry.weights))

    def run(params: Any, batch: Any, coefficients: Any, maps: Any) -> tuple[Any, Any]:
        made = ENGINES[ENGINE](case.loss, params, batch, geometry.groups, maps)
        return made.norms, made.weighted_sum(coefficients)

    compiled = jax.jit(run, compiler_options=QUICK)
    given = jnp.float32(coefficients)
    norms, sums = compiled(case.params, case.batch, given, maps)
    got = Outcome(norms, sums, want.layer_shares)
    assert_agree(want, got, tolerance, excess=2 * max(tolerance, case.excess))


def fixed(geometry: Any) -> PrivateTransformation:
    """A link that holds a public geometry."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return updates, state

    shares = jnp.ones(len(geometry.groups.names)) / len(geometry.groups.names)
    return PrivateTransformation(
        lambda params: optax.EmptyState(),
        update,
        role="score",
        geometry=lambda state: geometry,
        importance=lambda state: shares,
    )
