"""Facts that travel with a geometry: what the chain that made it says of the clip.

A geometry tells `dp_ilg.clipped_grad` in which norm to clip. Mode and clip norm are
said once, in the chain, and go the same way; what was clipped carries them back, and
the chain compares (law: one geometry).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from jax.core import Tracer


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ClipFacts:
    """What a chain wants of a clip; None where it does not say.

    Static: part of the tree structure of the `dp_ilg.Geometry` that carries them, so
    that no arithmetic on its arrays changes them.

    Attributes:
        clip_mode: the `dp_ilg.clipping.clip.ClipMode`.
        l2_clip_norm: the clip norm where it is a constant.
        score: which score of an example the chain releases.

    Privacy: public.

    Example:
        >>> jax.tree.leaves(ClipFacts(l2_clip_norm=1.0))
        []
    """

    clip_mode: Any = None
    l2_clip_norm: float | None = None
    score: Any = None


def joined_facts(parts: Iterable[ClipFacts | None]) -> ClipFacts | None:
    """What several say together: of each fact the first that is not None.

    Args:
        parts: facts, or None.

    Returns:
        The facts, or None if nobody says anything.

    Example:
        >>> joined_facts([None, ClipFacts(l2_clip_norm=2.0), ClipFacts(score="l1")])
        ClipFacts(clip_mode=None, l2_clip_norm=2.0, score='l1')
    """
    said = [part for part in parts if part is not None]
    if not said:
        return None
    names = [field.name for field in dataclasses.fields(ClipFacts)]
    found = {
        name: next((v for p in said if (v := getattr(p, name)) is not None), None)
        for name in names
    }
    return ClipFacts(**found)


def constant(value: Any) -> float | None:
    """A number as a static fact, or None where it is not known yet.

    Args:
        value: a number, or an array of one; perhaps traced.

    Returns:
        The number.

    Example:
        >>> constant(jax.numpy.float32(0.5)), jax.jit(lambda x: constant(x))(0.5)
        (0.5, None)
    """
    return None if isinstance(value, Tracer) else float(value)
