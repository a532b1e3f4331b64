"""Private numbers about the data: moments of features, counts, quantiles, accuracy.

Each is a sum that one example moves by at most 1, plus one Gaussian; whatever is
computed from the noisy sum is free. Bounds, bins and classes are the caller's and
public; computed from the data they would be another release. Terms are whole multiples
of 2^-24, rounded towards zero, so that sums do not round.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dp_ilg import validation
from dp_ilg.projection.pca import with_noise

if TYPE_CHECKING:
    import dp_accounting

_SLACK = 1e-12  # relative margin under sensitivity 1 for the rounding of one row
_PARTS = 2.0**24  # of 1, of which the terms of a sum are whole multiples
_MOST_ROWS = 2**29
_LEAST_SCALE = 1e-3  # of a feature, as a part of half its range


class PrivateNumbers(NamedTuple):
    """Numbers that may be shown, and what they cost.

    Attributes:
        values: name -> float64 array or number.
        name: of the release, for statement and ledger.
        noise_multiplier: of its Gaussian, relative to how far one example moves it.

    Privacy: public once charged: give `releases` to `dp_ilg.plan_privacy`.

    Example:
        >>> PrivateNumbers({"mean": 0.5}, "mean of features", 20.0).releases
        (('mean of features', 20.0),)
    """

    values: dict[str, Any]
    name: str
    noise_multiplier: float

    @property
    def releases(self) -> tuple[tuple[str, float], ...]:
        """What to give `dp_ilg.plan_privacy` as ``prior_releases=``."""
        return ((self.name, self.noise_multiplier),)

    def event(self) -> dp_accounting.DpEvent:
        """Returns the release as one Gaussian, for any accountant."""
        import dp_accounting  # slow to import, so only where it is needed

        return dp_accounting.GaussianDpEvent(self.noise_multiplier)


def private_moments(
    x: Any, *, lower: Any, upper: Any, noise_multiplier: Any, key: Any
) -> PrivateNumbers:
    """Mean and scale of every feature, in one Gaussian.

    Args:
        x: one example a row, ``[examples, features]``; a row that is not finite counts
            as the middle of the range.
        lower: public lower bound of the features, a number or ``[features]``; values
            below count as it.
        upper: likewise above.
        noise_multiplier: noise relative to what one example moves, above 0.
        key: PRNG key, secret, used for nothing else.

    Returns:
        `PrivateNumbers` with ``mean`` and ``scale`` (the standard deviation, at least a
        thousandth of half the range), float64 ``[features]``.

    Raises:
        ValueError: for no matrix, bounds that are not finite or not in order, or noise
            that is not positive.

    Privacy: a row becomes its features and their squares, in units of the range,
    divided by sqrt(2 features): a vector of length 1 at most. The number of rows is
    public.

    Example:
        >>> import jax
        >>> x = np.random.default_rng(0).normal(3.0, 2.0, (20_000, 2))
        >>> found = private_moments(
        ...     x, lower=-10, upper=10, noise_multiplier=20.0, key=jax.random.key(0))
        >>> [found.values[name].round().tolist() for name in ("mean", "scale")]
        [[3.0, 3.0], [2.0, 2.0]]
    """
    rows = _matrix(x)
    features = rows.shape[1]
    low, high = (
        np.broadcast_to(np.asarray(b, np.float64), features) for b in (lower, upper)
    )
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(
            f"lower is {lower!r} and upper is {upper!r}, but every feature needs "
            "finite bounds, the lower below the upper."
        )
    middle, half = (low + high) / 2, (high - low) / 2
    units = np.clip((rows - middle) / half, -1, 1)
    units = np.where(np.isfinite(rows).all(1, keepdims=True), units, 0.0)
    reach = math.sqrt(2 * features)
    both = np.concatenate([units, units**2], axis=1) * ((1 - _SLACK) / reach)
    total = np.trunc(both * _PARTS).sum(0) / _PARTS  # exact: below 2^53
    noised = _noised(total, noise_multiplier, key) * reach / len(rows)
    first, second = noised[:features], noised[features:]
    spread = np.sqrt(np.maximum(second - first**2, _LEAST_SCALE**2))
    values = {"mean": middle + half * np.clip(first, -1, 1), "scale": half * spread}
    return _numbers(values, "mean and scale of features", noise_multiplier)


def private_histogram(
    labels: Any, num_classes: Any, *, noise_multiplier: Any, key: Any
) -> PrivateNumbers:
    """How many examples have each label.

    Args:
        labels: whole numbers, ``[examples]``; others than 0 to ``num_classes - 1`` are
            absent.
        num_classes: how many labels there are; public.
        noise_multiplier: noise relative to one example, above 0.
        key: as for `private_moments`.

    Returns:
        `PrivateNumbers` with ``counts``, float64 ``[num_classes]``; small ones may be
        negative.

    Raises:
        ValueError: for labels that are no whole numbers in one axis, a number of
            classes below 1, or noise that is not positive.

    Privacy: one example moves one count by 1; replacing it moves two.

    Example:
        >>> import jax
        >>> labels = np.repeat([0, 1, 2], [500, 300, 200])
        >>> found = private_histogram(
        ...     labels, 3, noise_multiplier=4.0, key=jax.random.key(0))
        >>> bool((abs(found.values["counts"] - [500, 300, 200]) < 25).all())
        True
    """
    validation.whole("num_classes", num_classes)
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iub":
        raise ValueError(
            f"labels has the dtype {found.dtype} and shape {found.shape}, but must "
            "hold whole numbers in one axis."
        )
    inside = found[(found >= 0) & (found < num_classes)].astype(np.int64)
    counts = np.bincount(inside, minlength=int(num_classes)).astype(np.float64)
    noised = _noised(counts, noise_multiplier, key)
    return _numbers({"counts": noised}, "histogram of labels", noise_multiplier)


def private_quantile(
    values: Any, grid: Any, quantile: Any, *, noise_multiplier: Any, key: Any
) -> PrivateNumbers:
    """The point of a public grid below which a share of the values lies.

    For a clip norm: `values` are the norms of the examples' gradients under the first
    parameters.

    Args:
        values: one number an example, ``[examples]``; NaN counts as above the grid.
        grid: public points, increasing, ``[points]``.
        quantile: the share, in (0, 1).
        noise_multiplier: noise relative to one example, above 0.
        key: as for `private_moments`.

    Returns:
        `PrivateNumbers` with ``quantile``, the least point of the grid at which the
        noisy share is reached, or the last.

    Raises:
        ValueError: for a grid that does not increase, a share out of range, or noise
            that is not positive.

    Privacy: a histogram over the grid's intervals; the quantile is computed from it.
    The values are private, and so is the exact quantile. Their number is public.

    Example:
        >>> import jax
        >>> norms = np.random.default_rng(0).exponential(1.0, 5000)
        >>> found = private_quantile(norms, np.geomspace(0.01, 100, 81), 0.5,
        ...     noise_multiplier=10.0, key=jax.random.key(0))
        >>> 0.6 < found.values["quantile"] < 0.9
        True
    """
    validation.fraction("quantile", quantile)
    points = np.asarray(grid, np.float64)
    if points.ndim != 1 or not len(points) or not np.isfinite(points).all():
        raise ValueError("grid must hold finite points in one axis; give np.geomspace.")
    if (np.diff(points) <= 0).any():
        raise ValueError("grid must increase from point to point; sort it.")
    numbers = np.ravel(np.asarray(values, np.float64))
    places = np.searchsorted(points, np.nan_to_num(numbers, nan=np.inf), side="left")
    counts = np.bincount(places, minlength=len(points) + 1).astype(np.float64)
    noised = _noised(counts, noise_multiplier, key)
    reached = np.cumsum(noised[:-1]) >= float(quantile) * len(numbers)
    place = int(np.argmax(reached)) if reached.any() else len(points) - 1
    name = "quantile of a number an example"
    return _numbers({"quantile": float(points[place])}, name, noise_multiplier)


def private_accuracy(right: Any, *, noise_multiplier: Any, key: Any) -> PrivateNumbers:
    """The share of a *private* test set that a model gets right.

    Args:
        right: one bool a test example, ``[examples]``.
        noise_multiplier: noise relative to one example, above 0.
        key: as for `private_moments`.

    Returns:
        `PrivateNumbers` with ``accuracy`` in [0, 1] and ``standard_error``, that of the
        noise alone.

    Raises:
        ValueError: for anything but bools in one axis, or noise that is not positive.

    Privacy: a release about the people in the *test* set. They are others than those of
    the plan: quote `event` at a delta of their own, and do not add it to the plan's,
    unless somebody is in both. Every further model tested on them is another release.

    Example:
        >>> import jax
        >>> right = np.arange(10_000) % 10 > 0
        >>> found = private_accuracy(
        ...     right, noise_multiplier=20.0, key=jax.random.key(0))
        >>> round(found.values["accuracy"], 1), found.values["standard_error"]
        (0.9, 0.002)
    """
    found = np.asarray(right)
    if found.ndim != 1 or found.dtype != bool or not found.size:
        raise ValueError(
            f"right has the dtype {found.dtype} and shape {found.shape}, but must hold "
            "one bool a test example; pass predictions == labels."
        )
    total = np.array([float(found.sum())])
    noised = float(_noised(total, noise_multiplier, key)[0]) / len(found)
    values = {
        "accuracy": min(1.0, max(0.0, noised)),
        "standard_error": float(noise_multiplier) / len(found),
    }
    return _numbers(values, "accuracy on the test set", noise_multiplier)


def _noised(total: np.ndarray, noise_multiplier: Any, key: Any) -> np.ndarray:
    validation.positive("noise_multiplier", noise_multiplier)
    key = validation.key("key", key)
    return with_noise(total, float(noise_multiplier), key)


def _numbers(values: dict[str, Any], name: str, noise: Any) -> PrivateNumbers:
    return PrivateNumbers(values, name, float(noise))


def _matrix(x: Any) -> np.ndarray:
    rows = np.asarray(x, np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"x has the shape {rows.shape}, but must be [examples, features]; reshape "
            "it, with at least one of both."
        )
    if len(rows) > _MOST_ROWS:
        raise ValueError(
            f"x has {len(rows):,} rows, but sums are exact up to {_MOST_ROWS:,}; give "
            "a part of them."
        )
    return rows
