"""From updates in whitened coordinates to updates of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.geometry.geometry import Geometry


def unwhiten_updates() -> PrivateTransformation:
    """Multiplies an optimizer's update by ``L^-1`` transposed, leaf by leaf.

    Goes behind the optimizer where the geometry's `dp_ilg.geometry.maps.AxisMaps` say
    ``whitened=True``: what that optimizer saw was the mean of ``L^-1 g``, the gradient
    by z at ``w = w0 + L^-T z``. A step of z is ``L^-T`` as much in w. Weight decay
    behind this link decays the parameters, before it z.

    Where the maps change, what the optimizer has kept (momentum, second moments) stays
    in the old coordinates; refresh them seldom.

    Returns:
        A transformation; its update takes ``geometry=``, which `dp_ilg.chain` supplies.
        Geometries without whitened maps let everything through.

    Raises:
        ValueError: in an update without a geometry.
        TypeError: in an update before the noise.

    Privacy: post-processing of releases by public maps.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> from dp_ilg.geometry.maps import AxisMaps
        >>> params = {"w": jnp.ones(2)}
        >>> maps = AxisMaps.of(params, {"w": jnp.array([2.0, 4.0])}, whitened=True)
        >>> there = Geometry(jnp.ones(1), group(params), maps)
        >>> link = unwhiten_updates()
        >>> updates, _ = link.update(params, link.init(params), geometry=there)
        >>> updates["w"].tolist()
        [0.5, 0.25]

    Reference: as training a linear model on features times ``L^-1``.
    """

    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        **extra: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra
        if isinstance(updates, ClippedGrad):
            raise TypeError(
                "unwhiten_updates got a ClippedGrad; put it behind the noise and the "
                "optimizer."
            )
        if geometry is None:
            raise ValueError(
                "unwhiten_updates got no geometry; use dp_ilg.chain, which supplies "
                "it, or pass geometry= to update."
            )
        if geometry.coordinates is None or not geometry.coordinates.whitened:
            return updates, state
        leaves, treedef = jax.tree.flatten(updates)
        return jax.tree.unflatten(treedef, geometry.coordinates.steps(leaves)), state

    return PrivateTransformation(init, update, role="unwhiten")


def check_unwhitened(links: tuple[Any, ...], geometry: Geometry) -> None:
    """Raises where whitened updates would be added to parameters as they are.

    Args:
        links: of the chain, chains in it included.
        geometry: of the step.

    Raises:
        ValueError: for whitened maps without `unwhiten_updates`.

    Example:
        >>> import jax.numpy as jnp
        >>> check_unwhitened((), Geometry.uniform({"w": jnp.ones(2)}))
    """
    there = geometry.coordinates
    if there is None or not there.whitened or _has_link(links):
        return
    raise ValueError(
        "The optimizer steps in whitened coordinates, but nothing turns its updates "
        "into those of the parameters; put unwhiten_updates() behind it in the chain."
    )


def _has_link(links: tuple[Any, ...]) -> bool:
    return any(
        getattr(link, "role", "") == "unwhiten" or _has_link(getattr(link, "links", ()))
        for link in links
    )
