"""The last release, kept in a chain's state for scores that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import accumulator


class KeepReleaseState(NamedTuple):
    """What the last step released; zeros before the first."""

    last: Any


def keep_release() -> PrivateTransformation:
    """Keeps the last released gradient, and lets it through as it is.

    Goes behind `add_importance_noise` in a chain whose score reads
    ``statistics.release``; `dp_adam_ilg` puts it there by itself.

    Returns:
        A transformation whose state holds one copy of the parameters' size.

    Privacy: free; it keeps what was released anyway.

    Example:
        >>> keeper = keep_release()
        >>> state = keeper.init({"w": jnp.ones(2)})
        >>> _, state = keeper.update({"w": jnp.full(2, 3.0)}, state)
        >>> keeper.release(state)["w"].tolist()
        [3.0, 3.0]
    """

    def zeros(p: Any) -> Any:
        return jnp.zeros(jnp.shape(p), accumulator(jnp.asarray(p).dtype))

    def init(params: Params) -> KeepReleaseState:
        return KeepReleaseState(jax.tree.map(zeros, params))

    def update(
        updates: Params,
        state: KeepReleaseState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, KeepReleaseState]:
        del params, extra
        kept = jax.tree.map(lambda x, y: x.astype(y.dtype), updates, state.last)
        return updates, KeepReleaseState(kept)

    return PrivateTransformation(init, update, release=lambda state: state.last)


def release_reader(
    transformations: tuple[Any, ...], said: ClipFacts | None
) -> Callable[[Geometry, tuple[Any, ...]], Geometry]:
    """How a chain tells its geometry the last release, where its score reads that.

    Args:
        transformations: of the chain.
        said: its facts.

    Returns:
        A function of the geometry and the chain's state.

    Raises:
        ValueError: for a score that reads the release in a chain that keeps none.

    Example:
        >>> release_reader((), None)(3, ())
        3
    """
    if not getattr(getattr(said, "score", None), "reads_release", False):
        return lambda geometry, state: geometry
    keepers = [
        (place, t.release)
        for place, t in enumerate(transformations)
        if getattr(t, "release", None) is not None
    ]
    if not keepers:
        raise ValueError(
            f"The score {said and said.score} reads the last release, which the chain "
            "does not keep; put dp_ilg.optimizers.kept_release.keep_release() behind "
            "add_importance_noise."
        )
    place, release = keepers[-1]

    def told(geometry: Geometry, state: tuple[Any, ...]) -> Geometry:
        return dataclasses.replace(geometry, release=release(state[place]))

    return told
