"""From what an entry is expected to receive to how its noise is scaled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from dp_ilg.geometry.geometry import scaled_to_profile
from dp_ilg.geometry.rules import Rule

GIVEN = "given"
"""Stands for a rule where what is given is the scale of the noise itself."""


def axis_scale(
    rule: Rule | str, shares: Any, entries: int, damping: float = 0
) -> Array:
    """How the noise of the slices of a leaf is scaled along one axis.

    A slice (a row, an input feature, an eigenvector) with the share ``s_r`` of the
    squared gradient has the importance ``I_r = sqrt(s_r)`` and ``entries`` entries. The
    rule of the groups is applied to it as if it were a group: ``b_r = I_r^p n^-q``,
    scaled so that ``sum_r s_r / b_r^2 = 1``: an example with just these shares keeps
    its norm. Along one axis n is the same for all, so that q falls out.

    Args:
        rule: ``(importance, sizes) -> weights``; `GIVEN` takes the shares as b.
        shares: of the squared gradient, one a slice, up to a factor.
        entries: of one slice.
        damping: added to every share, as a part of their mean.

    Returns:
        Positive float32 scales b, at most a factor of 10,000 apart.

    Raises:
        ValueError: where known shares make the rule give what is no positive number.

    Example:
        >>> from dp_ilg.geometry.rules import RULES
        >>> found = axis_scale(RULES["paper"], [4.0, 1.0, 1.0], 10)
        >>> [round(float(b), 3) for b in found]
        [1.414, 0.707, 0.707]
        >>> axis_scale(RULES["uniform"], [4.0, 1.0], 10).tolist()
        [1.0, 1.0]
    """
    values = shares if isinstance(shares, Tracer) else np.asarray(shares, np.float64)
    if rule == GIVEN:
        _check_given(values)
        even = jnp.full(values.shape, 1 / values.size, jnp.float32)
        return scaled_to_profile(jnp.asarray(values, jnp.float32), even)
    if not isinstance(values, Tracer) and np.any(values > 0):
        values = values / values.max()  # up to a factor, so that float32 holds it
    found = jnp.maximum(jnp.asarray(values, jnp.float32), 0)
    mean = jnp.mean(found)
    known = jnp.isfinite(mean) & (mean > 0)
    found = jnp.where(known, found / jnp.where(known, mean, 1), 1)
    sizes = jnp.full(found.shape, entries, jnp.float32)
    function: Any = rule
    raw = jnp.asarray(function(jnp.sqrt(found + damping), sizes), jnp.float32)
    _check(raw, found)
    return scaled_to_profile(raw, found / jnp.sum(found))


def _check_given(values: Any) -> None:
    """Scales themselves are positive, and numbers in float32."""
    if isinstance(values, Tracer):
        return
    small, large = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    bad = np.flatnonzero(~((values >= small) & (values <= large)))
    if bad.size:
        raise ValueError(
            f"A given scale is {values[bad[0]]:g} at place {bad[0]}, but must be "
            "positive and finite in float32; leave rule out to give shares, which "
            "may be 0."
        )


def _check(raw: Array, shares: Array) -> None:
    """A rule that gives nonsense for entries is told at the door."""
    if raw.shape != shares.shape:
        raise ValueError(
            f"The importance rule gave shape {raw.shape} for {shares.size} entries, "
            "but must give one weight each."
        )
    if isinstance(raw, Tracer):
        return
    if not bool(jnp.all(jnp.isfinite(raw) & (raw >= 0)) & (jnp.max(raw) > 0)):
        raise ValueError(
            "The importance rule gave weights for single entries that are no finite "
            "positive numbers; take one of the rules by name, or Prior(..., rule=)."
        )
