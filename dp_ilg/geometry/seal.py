"""Whether a clipped sum still has the bound it says, before noise is drawn for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dp_ilg.base import SEAL, ClippedGrad
from dp_ilg.geometry.groups import Groups


def sealed(clipped: ClippedGrad) -> Any:
    """Whether a sum is as clipping left it; raises where that is known to be false.

    Args:
        clipped: a sum.

    Returns:
        A bool array without axes, traced where the seal is.

    Raises:
        ValueError: for a sum that arithmetic was done on, as far as that is known
            before values are.

    Example:
        >>> clipped = ClippedGrad({"w": jnp.ones(2)}, jnp.ones(1), None, 1.0)
        >>> bool(sealed(clipped))
        True
        >>> sealed(jax.tree.map(lambda x: x / 2, clipped))
        Traceback (most recent call last):
        ValueError: Arithmetic was done on a whole ClippedGrad (jax.lax.psum, ...
    """
    parts = [jnp.asarray(x) for x in jax.tree.leaves(clipped.seal)]
    kinds = [[(x.dtype, x.shape) for x in seal] for seal in (parts, SEAL)]
    whole: Any = kinds[0] == kinds[1]
    if whole:
        marks = [jnp.all(x == y) for x, y in zip(parts[1:], SEAL[1:], strict=True)]
        whole = jnp.all(parts[0]) & jnp.stack(marks).all()
    narrow = {jnp.result_type(x) for x in jax.tree.leaves(clipped.gradients)}
    narrow = {x for x in narrow if jnp.issubdtype(x, jnp.floating) and x.itemsize < 4}
    if narrow:
        raise ValueError(
            f"A sum was cast to {min(map(str, narrow))}, which rounds it by more than "
            "its bound allows; hand over what clipping returned."
        )
    if not isinstance(whole, Tracer) and not bool(whole):
        raise ValueError(
            "Arithmetic was done on a whole ClippedGrad (jax.lax.psum, pmean, or a sum "
            "by jax.tree.map), which changes its bound as well; add devices with "
            "dp_ilg.clipping.lots.sum_over_axis(clipped, axis_name), chunks with +, "
            "and let Optax scale behind the noise."
        )
    return whole


def sound(clipped: ClippedGrad) -> Any:
    """Whether a sum has a bound that noise can be drawn for; if not, release NaN.

    A clip norm or weight that is no positive number says that no bound is known, or
    that something (``optax.zero_nans``) has overwritten the NaN that said so.

    Args:
        clipped: a sum.

    Returns:
        A bool array without axes.

    Raises:
        ValueError: as `sealed`.

    Privacy: a function of public values only: bound, weights and seal.

    Example:
        >>> import dataclasses, dp_ilg
        >>> geometry = dp_ilg.Geometry.uniform({"w": jnp.ones(2)})
        >>> clipped = ClippedGrad({"w": jnp.ones(2)}, jnp.ones(1), geometry, 1.0)
        >>> bool(sound(clipped)), bool(sound(dataclasses.replace(
        ...     clipped, l2_clip_norm=0.0)))
        (True, False)
    """
    facts = (clipped.geometry.divisors(), clipped.l2_clip_norm)
    good = [jnp.all(jnp.isfinite(x) & (jnp.asarray(x) > 0)) for x in facts]
    return sealed(clipped) & good[0] & good[1]


def check_clipped(updates: Any, groups: Groups, reader: str, whose: str) -> None:
    """Raises for what is no sum that was clipped in a reader's own groups.

    Args:
        updates: what a link of a chain was given.
        groups: those the link knows.
        reader: name of the link, for the sentence.
        whose: what stands for the groups there, such as "scored groups".

    Raises:
        TypeError: for anything but a `ClippedGrad`.
        ValueError: for one of other groups.

    Privacy: looks at types and names only.

    Example:
        >>> from dp_ilg.geometry.layers import group
        >>> own = group({"w": jnp.ones(2)})
        >>> check_clipped(3, own, "score_layer_importance", "scored groups")
        Traceback (most recent call last):
        TypeError: score_layer_importance got int, not a ClippedGrad; put ...
    """
    if not isinstance(updates, ClippedGrad):
        raise TypeError(
            f"{reader} got {type(updates).__name__}, not a ClippedGrad; put "
            "clip_per_example before it in the chain."
        )
    if updates.geometry.groups != groups:
        raise ValueError(
            f"The gradients were clipped in {updates.geometry.groups.names}, but the "
            f"{whose} are {groups.names}; clip with this optimizer's geometry(state)."
        )
