"""Adam whose groups count their own steps: those in which they were kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import Groups, accumulator
from dp_ilg.geometry.layers import group


class ScaleByAdamOfKeptState(NamedTuple):
    """Adam's moments, and how many steps each group has taken.

    Attributes:
        counts: int32 ``[groups]``: steps in which the group was kept.
        mu: first moment, float32 or wider, shaped like the parameters.
        nu: second moment, the same.
    """

    counts: Any
    mu: Any
    nu: Any


def scale_by_adam_of_kept(
    *, layers: Any = "module", b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> PrivateTransformation:
    """Adam in which a dropped group stands still, its clock included.

    A rule such as `dp_ilg.geometry.rules.top_k` drops groups for a step. Ordinary Adam
    would take their release, which is 0, for a gradient: moments would fade, the step
    would go on by what is left of them, and a group that has taken two of a hundred
    steps would be corrected for a hundred. Here a group's trajectory is Adam's on the
    steps in which it was kept, as if there had been no others.

    Args:
        layers: what a layer is, as given to the scorer.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.

    Returns:
        A transformation for a `dp_ilg.chain`, behind `add_importance_noise`; where no
        group is ever dropped it is Adam.

    Raises:
        ValueError: for decays outside [0, 1), an epsilon that is not positive, or in an
            update without a geometry of the same groups.

    Privacy: post-processing: which groups are kept is a function of earlier releases.

    Example:
        >>> import dp_ilg
        >>> link = scale_by_adam_of_kept(layers="leaf")
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> groups = dp_ilg.layers.group(params, "leaf")
        >>> there = Geometry(jnp.array([1.0, 0.0]), groups, drops=True)
        >>> updates, state = link.update(params, link.init(params), geometry=there)
        >>> updates["b"].tolist(), state.counts.tolist()
        ([0.0, 0.0, 0.0], [1, 0])

    Reference: Kingma and Ba 2015, Algorithm 1, group by group.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        validation.fraction(name, value, include_zero=True)
    validation.positive("eps", eps)

    def init(params: Params) -> ScaleByAdamOfKeptState:
        zeros = lambda p: jnp.zeros(p.shape, accumulator(p.dtype))  # noqa: E731
        return ScaleByAdamOfKeptState(
            counts=jnp.zeros(len(group(params, layers).names), jnp.int32),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
        )

    def update(
        updates: Params,
        state: ScaleByAdamOfKeptState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        **extra: Any,
    ) -> tuple[Params, ScaleByAdamOfKeptState]:
        del params, extra
        groups = _groups(geometry, state)
        kept = jnp.ones_like(state.counts, bool)
        if geometry is not None and geometry.drops:
            kept = geometry.kept()
        counts = state.counts + kept
        leaves, treedef = jax.tree.flatten(updates)
        old = zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
        clock = _clock(groups, counts, kept.astype(jnp.float32), (b1, b2))
        found = [
            _moved(x, own, now, (b1, b2, eps))
            for x, own, now in zip(leaves, old, clock, strict=True)
        ]
        steps, mu, nu = (
            jax.tree.unflatten(treedef, x) for x in zip(*found, strict=True)
        )
        return steps, ScaleByAdamOfKeptState(counts, mu, nu)

    return PrivateTransformation(init, update)


def _clock(
    groups: Groups, counts: Array, kept: Array, decays: tuple[Any, Any]
) -> list[tuple[Array, ...]]:
    """Of every leaf: who is kept, and the corrections of both moments."""
    taken = jnp.maximum(counts, 1).astype(jnp.float32)
    parts = (kept, *[1 - decay**taken for decay in decays])
    there, first, second = (groups.expand(x) for x in parts)
    return list(zip([x > 0 for x in there], first, second, strict=True))


def _moved(
    release: Array,
    moments: tuple[Array, Array],
    clock: tuple[Array, ...],
    settings: tuple[Any, Any, Any],
) -> tuple[Array, Array, Array]:
    """Step and moments of one leaf; where it is dropped, 0 and the old ones."""
    (mu, nu), (kept, first, second), (b1, b2, eps) = moments, clock, settings
    wide = release.astype(mu.dtype)
    new_mu = jnp.where(kept, b1 * mu + (1 - b1) * wide, mu)
    new_nu = jnp.where(kept, b2 * nu + (1 - b2) * jnp.square(wide), nu)
    own, other = (x.astype(mu.dtype) for x in (first, second))
    own, other = (jnp.where(kept, x, 1) for x in (own, other))
    step = (new_mu / own) / (jnp.sqrt(new_nu / other) + eps)
    return jnp.where(kept, step, 0), new_mu, new_nu


def _groups(geometry: Geometry | None, state: ScaleByAdamOfKeptState) -> Groups:
    if geometry is None:
        raise ValueError(
            "scale_by_adam_of_kept does not know which layers were dropped; put it "
            "behind add_importance_noise in a dp_ilg.chain."
        )
    count = len(geometry.groups.names)
    if state.counts.shape != (count,):
        raise ValueError(
            f"scale_by_adam_of_kept was made for {state.counts.shape[0]} layers, but "
            f"the geometry has {count}; give both the same layers=."
        )
    return geometry.groups
