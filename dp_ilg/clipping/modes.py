"""Clip modes: how one example's norms become the factors that bound it.

Every mode keeps the clipped example within C in the geometry's norm, so the noise and
the accounting do not depend on the mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.geometry.facts import constant
from dp_ilg.geometry.groups import weighted_norm

_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_USUAL_GAMMA = 1e-4
SAME_NORM = 1e-5
"""Clip norms that differ by less, relatively, differ by rounding alone."""


@dataclass(frozen=True)
class ClipMode:
    """A named way to bound one example; made by `joint`, `normalize`, `per_layer`.

    Attributes:
        name: as in `CLIP_MODES`.
        coefficients: maps ``(norms [batch, groups], weights [groups], C)`` to
            ``[batch]`` or ``[batch, groups]`` coefficients.
        settings: numbers it was made with, for its name in messages; None where they
            are not known yet (traced).
        boxed: whether it bounds every group by ``C w_j / sqrt(groups)``. Where groups
            are dropped, a box of the kept ones has room for larger bounds.
    """

    name: str
    coefficients: Callable[[Array, Array, Any], Array]
    settings: tuple[tuple[str, float], ...] | None = ()
    boxed: bool = False

    def __str__(self) -> str:
        """The name, and the settings that are not the usual ones."""
        own = ", ".join(f"{name}={value:g}" for name, value in self.settings or ())
        return f"{self.name}({own})" if own else repr(self.name)

    def agrees(self, other: ClipMode) -> bool:
        """Whether another bounds examples alike, as far as is known before values."""
        unknown = None in (self.settings, other.settings)
        return self == other or (unknown and self.name == other.name)


def joint() -> ClipMode:
    """Clips the whole example in the geometry's norm: ``min(1, C / ||g||_w)``.

    Example:
        >>> import jax.numpy as jnp
        >>> norms, weights = jnp.array([[3.0, 4.0]]), jnp.ones(2)
        >>> joint().coefficients(norms, weights, 2.5).tolist()
        [0.5]

    Reference: Abadi et al. 2016, Algorithm 1, in the norm of docs/idea.md.
    """
    return ClipMode("joint", _joint)


def _joint(norms: Array, weights: Array, bound: Any) -> Array:
    return jnp.minimum(1.0, bound / weighted_norm(norms, weights))


def normalize(gamma: float = _USUAL_GAMMA) -> ClipMode:
    """Scales every example to (nearly) C: ``C / (||g||_w + gamma)``.

    Args:
        gamma: public stability constant; examples far below it fade out.

    Returns:
        The mode, also called automatic clipping.

    Raises:
        ValueError: unless `gamma` is a positive number that float32 holds in full:
            one below 1.2e-38 is flushed to 0, and a gradient of 0 would be NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> norms, weights = jnp.array([[0.3, 0.4]]), jnp.ones(2)
        >>> normalize(0.5).coefficients(norms, weights, 1.0).tolist()
        [1.0]

    Reference: Bu et al. 2022 (automatic clipping, AUTO-S).
    """
    validation.positive("gamma", gamma)
    if isinstance(gamma, Tracer):
        return ClipMode("normalize", _normalized(gamma), settings=None)
    if gamma < _SMALLEST:
        raise ValueError(
            f"gamma is {float(gamma)}, which float32 flushes to 0; make it at least "
            f"{_SMALLEST:.2g}, the smallest normal number."
        )
    return _normalize(float(gamma))


@functools.lru_cache(maxsize=256)
def _normalize(gamma: float) -> ClipMode:
    """One object a gamma, so that equal modes are equal and compile one program."""
    settings = () if gamma == _USUAL_GAMMA else (("gamma", gamma),)
    return ClipMode("normalize", _normalized(gamma), settings)


def _normalized(gamma: Any) -> Callable[[Array, Array, Any], Array]:
    def coefficients(norms: Array, weights: Array, bound: Any) -> Array:
        away = weighted_norm(norms, weights) + jnp.maximum(gamma, _SMALLEST)
        # A large C over a tiny gamma is infinite, and that times 0 is NaN.
        return jnp.minimum(bound / away, float(jnp.finfo(jnp.float32).max))

    return coefficients


def per_layer() -> ClipMode:
    """Clips every group on its own, to ``C w_j / sqrt(J)``.

    The box of these bounds lies inside the ellipsoid ``||g||_w <= C``, so the noise
    is the same as for `joint`; it clips more.

    Example:
        >>> import jax.numpy as jnp
        >>> norms, weights = jnp.array([[0.5, 4.0, 0.0, 0.0]]), jnp.ones(4)
        >>> per_layer().coefficients(norms, weights, 2.0).tolist()
        [[1.0, 0.25, 1.0, 1.0]]

    Reference: He et al. 2023 (group-wise clipping); McMahan et al. 2018.
    """
    return ClipMode("per_layer", _per_layer, boxed=True)


def _per_layer(norms: Array, weights: Array, bound: Any) -> Array:
    return jnp.minimum(1.0, group_bounds(weights, bound) / norms)


CLIP_MODES = {"joint": joint, "normalize": normalize, "per_layer": per_layer}


def as_clip_mode(mode: str | ClipMode) -> ClipMode:
    """Reads a name of `CLIP_MODES` or a `ClipMode`.

    Raises:
        ValueError: for anything else.

    Example:
        >>> as_clip_mode("joint").name
        'joint'
    """
    if isinstance(mode, ClipMode):
        return mode
    if not isinstance(mode, str) or mode not in CLIP_MODES:
        raise ValueError(
            f"clip_mode is {validation.shown(mode)}, but must be one of "
            f"{sorted(CLIP_MODES)}."
        )
    return _named(mode)


@functools.cache
def _named(mode: str) -> ClipMode:
    """One object a name, so that equal calls compile one program."""
    return CLIP_MODES[mode]()


def group_bounds(weights: Float[Array, " groups"], bound: Any) -> Array:
    """The box inside the ellipsoid ``||g||_w <= C``: ``C w_j / sqrt(groups)`` each.

    Example:
        >>> import jax.numpy as jnp
        >>> group_bounds(jnp.array([1.0, 3.0, 1.0, 1.0]), 2.0).tolist()
        [1.0, 3.0, 1.0, 1.0]
    """
    return bound * weights / jnp.sqrt(weights.shape[-1])


def room(mode: ClipMode, kept: Any, bound: Any) -> Any:
    """The bound that a mode is given where some groups may be dropped.

    A dropped group is shown to a mode as one of norm 0 and weight 1. In a box of J
    groups of which K are kept, every side may be longer by ``sqrt(J / K)``: the squares
    of the K that are left still add up to C's. Four roundings more are taken off it.

    Args:
        mode: of the clip.
        kept: bool ``[groups]``, or None where none can be dropped.
        bound: C.

    Returns:
        C, or for a box of fewer groups more.

    Example:
        >>> import jax.numpy as jnp
        >>> kept = jnp.array([True, False, False, False])
        >>> round(float(room(per_layer(), kept, 1.0)), 4), room(joint(), kept, 1.0)
        (2.0, 1.0)
    """
    if kept is None or not mode.boxed:
        return bound
    count = jnp.maximum(jnp.sum(kept), 1).astype(jnp.float32)
    return bound * (jnp.sqrt(kept.shape[-1] / count) * np.float32(1 - 2.0**-22))


def agreed_mode(geometry: Any, given: ClipMode | None, l2_clip_norm: Any) -> ClipMode:
    """The clip mode of a clip, said by the chain, by the call, or by both alike.

    Args:
        geometry: of the clip, with the `ClipFacts` of the chain it comes from, if any.
        given: what the call itself says, or None.
        l2_clip_norm: the clip norm of the call.

    Returns:
        The mode; `joint` where nobody says one.

    Raises:
        ValueError: if the two say different modes, or norms that are known to differ.

    Example:
        >>> import dp_ilg
        >>> geometry = dp_ilg.Geometry.uniform({"w": jnp.zeros(2)})
        >>> agreed_mode(geometry, None, 1.0).name
        'joint'
    """
    facts = getattr(geometry, "facts", None)
    said = getattr(facts, "clip_mode", None)
    norm, own = getattr(facts, "l2_clip_norm", None), constant(l2_clip_norm)
    if norm is not None and own is not None:
        if not abs(own - norm) <= SAME_NORM * norm:
            raise ValueError(other_norm(f"{own:g}", f"{norm:g}"))
    if said is not None and given is not None and not given.agrees(said):
        raise ValueError(other_mode(given, said))
    return said or given or as_clip_mode("joint")


def other_norm(own: str, norm: str) -> str:
    """The sentence for gradients of another clip norm than the chain's."""
    return (
        f"l2_clip_norm is {own} in clipped_grad, but {norm} in the chain whose noise "
        "is drawn for it; give both plan.l2_clip_norm of one plan, or clip with a "
        "geometry of public weights and hand it to tx.update(..., geometry=), too."
    )


def other_mode(own: ClipMode, said: ClipMode) -> str:
    """The sentence for gradients of another clip mode than the chain's."""
    return (
        f"clip_mode is {own} in clipped_grad, but {said} in the chain; say it in one "
        "place, the chain, and leave it out of clipped_grad."
    )
