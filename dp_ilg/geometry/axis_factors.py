"""The factor of one axis and its inverse, from a scale or a symmetric matrix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from dp_ilg.geometry.geometry import LARGEST_RATIO

_SYMMETRIC = 1e-4  # how unlike its transpose a matrix may be, as a part of its largest


def inverse_pair(name: str, given: Any, size: int, power: float) -> tuple[Any, Any]:
    """``L^-1`` and L for one axis, L a power of what is given.

    Args:
        name: of leaf and axis, for errors.
        given: None, a positive vector ``[size]``, or a symmetric matrix with positive
            eigenvalues, ``[size, size]``; perhaps traced.
        size: of the axis.
        power: the power; eigenvalues are raised to it.

    Returns:
        Two float32 arrays, or two None. See `dp_ilg.geometry.maps.AxisMaps.of` for what
        becomes of bad values that are traced.

    Raises:
        ValueError: for another shape, and for bad values that are known.

    Example:
        >>> into, back = inverse_pair("w", [1.0, 4.0], 2, 0.5)
        >>> into.tolist(), back.tolist()
        ([1.0, 0.5], [1.0, 2.0])
    """
    if given is None:
        return None, None
    traced = isinstance(given, Tracer)
    try:
        values: Any = given if traced else np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"The map of {name} must be an array of numbers.") from None
    if values.shape not in ((size,), (size, size)):
        raise ValueError(
            f"The map of {name} has shape {values.shape}, but the axis has {size} "
            f"entries; give a vector of {size} scales or a matrix of {size} x {size}."
        )
    if traced:
        return _traced(values, power)
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"The map of {name} has entries that are no finite numbers; give finite "
            "ones."
        )
    return _known(name, values, power)


def _known(name: str, values: np.ndarray, power: float) -> tuple[Array, Array]:
    """Both factors in float64, rounded once."""
    spectrum, turn = values, None
    if values.ndim == 2:
        unlike = np.max(np.abs(values - values.T), initial=0)
        if unlike > _SYMMETRIC * np.max(np.abs(values), initial=0):
            raise ValueError(
                f"The map of {name} is a matrix unlike its transpose; give a symmetric "
                "one, such as (M + M.T) / 2."
            )
        spectrum, turn = np.linalg.eigh((values + values.T) / 2)
    _check_spectrum(name, spectrum, power, "entry" if turn is None else "eigenvalue")
    both = spectrum**-power, spectrum**power
    if turn is not None:
        both = tuple((turn * x) @ turn.T for x in both)
    into, back = (jnp.asarray(x, jnp.float32) for x in both)
    return into, back


def _check_spectrum(name: str, values: np.ndarray, power: float, word: str) -> None:
    least = float(np.min(values))
    if least <= 0:
        raise ValueError(
            f"The map of {name} has the {word} {least:g}, but all must be positive; "
            "add a small constant."
        )
    ratio = (float(np.max(values)) / least) ** abs(power)
    if ratio > LARGEST_RATIO * (1 + 1e-6):
        raise ValueError(
            f"The map of {name} stretches by factors that are {ratio:.3g} apart, but "
            f"at most {LARGEST_RATIO:,.0f} keep norms sharp; raise the small ones."
        )


def _traced(values: Array, power: float) -> tuple[Array, Array]:
    """The same where values are not known yet: nothing is refused, small is raised."""
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if wide.ndim == 1:
        spectrum = _raised(wide, power)
        return spectrum**-power, spectrum**power
    good = jnp.all(jnp.isfinite(wide))
    plain = jnp.where(good, (wide + wide.T) / 2, jnp.eye(len(wide), dtype=wide.dtype))
    spectrum, turn = jnp.linalg.eigh(plain)
    spectrum = _raised(spectrum, power)
    into, back = ((turn * x) @ turn.T for x in (spectrum**-power, spectrum**power))
    return into, back


def _raised(spectrum: Array, power: float) -> Array:
    """Positive numbers whose power spans a factor of 10,000 at most."""
    usable = jnp.where(jnp.isfinite(spectrum) & (spectrum > 0), spectrum, 0.0)
    usable = jnp.where(jnp.max(usable) > 0, usable, jnp.ones_like(usable))
    share = LARGEST_RATIO ** (-1 / max(abs(power), 1e-3))
    return jnp.maximum(usable, jnp.max(usable) * share)
