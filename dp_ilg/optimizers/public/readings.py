"""What an optimizer is given of a release that was clipped in maps of its leaves.

With ``L`` the map and ``g`` the mean clipped gradient there are three readings, rows of
`READINGS`. Under plain SGD they move the parameters by ``g``, ``L^-1 g`` and
``L^-T L^-1 g``. Under Adam, which ignores the size of entries, the first two agree
where ``L`` is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.optimizers.whitened import unwhiten_updates


class Reading(NamedTuple):
    """A row of `READINGS`.

    Attributes:
        whitened: the flag of the `dp_ilg.geometry.maps.AxisMaps`.
        around: an optimizer's links -> the links that stand behind the noise.
    """

    whitened: bool
    around: Callable[[list[Any]], list[Any]]


READINGS: dict[str, Reading] = {
    "restored": Reading(False, lambda links: links),
    "preconditioned": Reading(False, lambda links: [precondition(), *links]),
    "whitened": Reading(True, lambda links: [*links, unwhiten_updates()]),
}


def as_reading(name: Any) -> Reading:
    """The row of a name.

    Args:
        name: "restored" (an ordinary gradient with shaped noise), "preconditioned"
            (``L^-1`` times it, which is what DP-KFC steps with) or "whitened"
            (training in ``z`` with ``w = w0 + L^-T z``, which is what scaling the
            features of a linear model does).

    Returns:
        The row.

    Raises:
        ValueError: for any other.

    Example:
        >>> as_reading("whitened").whitened
        True
    """
    if not isinstance(name, str) or name not in READINGS:
        raise ValueError(
            f"steps is {validation.shown(name)}, but must be one of {sorted(READINGS)}."
        )
    return READINGS[name]


def precondition() -> PrivateTransformation:
    """Multiplies a released gradient by ``L^-1``, leaf by leaf.

    Goes right behind the noise, in a chain whose geometry has maps. The optimizer then
    sees the noise as it was drawn, alike in all directions of a group.

    Returns:
        A transformation; its update takes ``geometry=``, which `dp_ilg.chain` supplies.
        Geometries without maps let everything through.

    Raises:
        ValueError: in an update without a geometry.
        TypeError: in an update before the noise.

    Privacy: post-processing of a release by public maps.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> from dp_ilg.geometry.maps import AxisMaps
        >>> params = {"w": jnp.ones(2)}
        >>> maps = AxisMaps.of(params, {"w": jnp.array([2.0, 4.0])})
        >>> there = Geometry(jnp.ones(1), group(params), maps)
        >>> precondition().update(params, (), geometry=there)[0]["w"].tolist()
        [0.5, 0.25]

    Reference: Molina Van den Bosch et al. 2026 (DP-KFC), whose steps these are.
    """

    def update(
        updates: Any,
        state: Any,
        params: Params | None = None,
        *,
        geometry: Geometry | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del params, extra
        if isinstance(updates, ClippedGrad):
            raise TypeError(
                "precondition got a ClippedGrad; put it behind add_importance_noise."
            )
        if geometry is None:
            raise ValueError(
                "precondition got no geometry; use dp_ilg.chain, which supplies it, or "
                "pass geometry= to update."
            )
        if geometry.coordinates is None:
            return updates, state
        leaves, treedef = jax.tree.flatten(updates)
        return jax.tree.unflatten(treedef, geometry.coordinates.entered(leaves)), state

    return PrivateTransformation(lambda params: optax.EmptyState(), update)
