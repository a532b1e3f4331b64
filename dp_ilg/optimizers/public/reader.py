"""How a chain puts the maps of one link into the geometry of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dp_ilg.geometry.geometry import Geometry


def maps_reader(
    transformations: tuple[Any, ...], holder: int
) -> Callable[[Geometry, Any], Geometry]:
    """How a chain tells its geometry the maps of entries, where a link has them.

    Args:
        transformations: of the chain.
        holder: which of them holds the weights of groups.

    Returns:
        A function of the geometry and the chain's state.

    Raises:
        ValueError: for two links with maps, or scales of another kind.

    Example:
        >>> maps_reader((), 0)(3, ())
        3
    """
    places = [k for k, t in enumerate(transformations) if getattr(t, "maps", None)]
    if not places:
        return lambda geometry, state: geometry
    if len(places) > 1:
        raise ValueError(
            f"The chain has {len(places)} priors or probes with scales of entries; "
            "give it one, with the vectors of all leaves."
        )
    (place,) = places
    if place == holder:
        return lambda geometry, state: geometry
    maps = transformations[place].maps

    def told(geometry: Geometry, state: Any) -> Geometry:
        if geometry.coordinates is not None:
            raise ValueError(
                "The chain has two sources of scales of entries; leave out the prior "
                "or probe, or scale_coordinates."
            )
        return dataclasses.replace(geometry, coordinates=maps(state[place]))

    return told
