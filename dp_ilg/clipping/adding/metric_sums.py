"""Metrics of single examples: bounded, centred, and added without rounding.

A metric is a number that one example gives, such as its loss or whether the guess is
right. Clipped to its bounds, moved to the middle of them and divided by half of what
they span, it lies in [-1, 1]; the K metrics of one example, divided by sqrt(K), are a
vector of norm at most 1, whatever the functions return. The sum of these vectors over
the examples of a step is what `dp_ilg.release_metrics` adds noise to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dp_ilg.base import MOST_METRICS, Example, LossFn, Params
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.clipping.purity import no_scalar
from dp_ilg.geometry.grid import SHARE_STEP, split_shares, two_sum

Facts = tuple[tuple[str, float, float], ...]
"""Name, lower and upper bound of every metric, in the order of the names."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A bounded number that one example gives, to be released as a noisy mean.

    Attributes:
        function: ``(loss, aux) -> number`` of one example; `loss` is what the loss
            function returns for it, `aux` what it returns beside that with
            ``has_aux=True``, else None.
        low: the smallest value; what is below counts as this.
        high: the largest value; what is above counts as this.

    Raises:
        ValueError: unless both bounds are finite and `low` is below `high`.
        TypeError: for a function that is none.

    Privacy: the bounds are public and must not come from the data. The narrower they
    are, the less noise there is, and the more is cut off.

    Example:
        >>> loss = Metric(lambda loss, aux: loss, low=0.0, high=5.0)
        >>> loss.middle, loss.half
        (2.5, 2.5)
    """

    function: Callable[[Any, Any], Any]
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(
                f"The metric is {type(self.function).__name__}, but must be a function "
                "(loss, aux) -> number of one example."
            )
        for name in ("low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(
                f"The metric's bounds are {self.low:g} and {self.high:g}, but must be "
                "finite, the first below the second."
            )

    @property
    def middle(self) -> float:
        """The value that counts as 0."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """How far a value can be from the middle."""
        return (self.high - self.low) / 2


Metrics = tuple[tuple[str, Metric], ...]
"""Checked metrics with their names, in the order of the names."""


def as_metrics(metrics: Any) -> Metrics:
    """Checks a mapping from names to metrics, and sorts it by name.

    Args:
        metrics: the mapping; None or an empty one for no metrics.

    Returns:
        Pairs of a name and a `Metric`.

    Raises:
        TypeError: for anything else.
        ValueError: for an empty name, or more than `MOST_METRICS`.

    Example:
        >>> as_metrics({"accuracy": max})
        Traceback (most recent call last):
        TypeError: metrics['accuracy'] is builtin_function_or_method, but must be a ...
    """
    if metrics is None:
        return ()
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics is {type(metrics).__name__}, but must be a mapping such as "
            "{'loss': dp_ilg.Metric(lambda loss, aux: loss, high=5.0)}."
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"A metric is called {name!r}, but must have a name, such as 'loss'."
            )
        if not isinstance(metric, Metric):
            raise TypeError(
                f"metrics[{name!r}] is {type(metric).__name__}, but must be a "
                "dp_ilg.Metric, which says its bounds: Metric(function, low, high)."
            )
    if len(metrics) > MOST_METRICS:
        raise ValueError(
            f"There are {len(metrics)} metrics, but a step releases at most "
            f"{MOST_METRICS}; choose the ones you will look at."
        )
    return tuple(sorted(metrics.items()))


def facts_of(metrics: Metrics) -> Facts:
    """What is public of metrics: names and bounds.

    Example:
        >>> facts_of(as_metrics({"right": Metric(lambda loss, aux: aux)}))
        (('right', 0.0, 1.0),)
    """
    return tuple((name, metric.low, metric.high) for name, metric in metrics)


def reach_of(count: int) -> float:
    """How far one of so many metrics may move its sum: 1 / sqrt(K), rounded down.

    A whole multiple of the public step, so that K squares add up to at most 1 exactly.

    Example:
        >>> reach_of(1), 0 < 0.5**0.5 - reach_of(2) < 2**-24
        (1.0, True)
    """
    steps = round(1 / SHARE_STEP)
    return math.isqrt(steps * steps // count) / steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MetricSums:
    """The sum over examples of bounded metric vectors; the field of a `ClippedGrad`.

    Attributes:
        total: float32 ``[metrics]``, in units in which one example reaches 1 in L2.
        remainder: what `total` was rounded by, float32 ``[metrics]``.
        facts: name and bounds of every metric; static.

    Privacy: adding or removing one example moves ``total + remainder`` by at most 1 in
    L2. Not private before noise.

    Example:
        >>> one = MetricSums(jnp.ones(1), jnp.zeros(1), (("loss", 0.0, 1.0),))
        >>> (one + one).total.tolist()
        [2.0]
    """

    total: Any
    remainder: Any
    facts: Facts = dataclasses.field(metadata=dict(static=True))

    def __add__(self, other: Any) -> MetricSums:
        """Joins two chunks of the same step, exactly."""
        if not isinstance(other, MetricSums):
            return NotImplemented
        if self.facts != other.facts:
            raise ValueError(
                f"Two chunks have the metrics {self.facts} and {other.facts}; clip all "
                "chunks of a step with the same metrics."
            )
        high, rest = two_sum(self.total, other.total)
        high, low = two_sum(high, self.remainder + other.remainder + rest)
        return MetricSums(high, low, self.facts)

    def reduced(self, add: Callable[[Array], Array]) -> MetricSums:
        """The sum over devices, exactly; `add` is such as a ``psum``."""
        with wide():
            total = add(widened(self.total) + widened(self.remainder))
            return MetricSums(*split_shares(total), self.facts)


def no_metrics(facts: Facts) -> MetricSums | None:
    """The sum over nobody; None where there are no metrics.

    Example:
        >>> no_metrics(()) is None, no_metrics((("loss", 0.0, 1.0),)).total.tolist()
        (True, [0.0])
    """
    zeros = jnp.zeros(len(facts), jnp.float32)
    return MetricSums(zeros, jnp.copy(zeros), facts) if facts else None


def sum_metrics(
    values: Float[Array, "batch metrics"], present: Bool[Array, " batch"], facts: Facts
) -> MetricSums:
    """Adds the bounded vectors of the examples that are there.

    Args:
        values: of every example, centred and scaled; what is outside [-1, 1] is cut.
        present: False for padding and for examples without a finite gradient.
        facts: name and bounds of every metric.

    Returns:
        The sum, on a public grid: each entry is rounded towards zero by itself.

    Privacy: sensitivity 1 for adding or removing one example. One whose values are not
    all finite adds nothing to any metric.

    Example:
        >>> values = jnp.array([[0.5, 2.0], [jnp.nan, 1.0], [1.0, 1.0]])
        >>> present = jnp.array([True, True, False])
        >>> found = sum_metrics(values, present, (("a", 0., 1.), ("b", 0., 1.)))
        >>> (found.total * 2**0.5).round(4).tolist()
        [0.5, 1.0]
    """
    usable = present & jnp.all(jnp.isfinite(values), axis=-1)
    inside = jnp.where(usable[:, None], jnp.clip(values, -1, 1), 0)
    with wide():
        most = np.float64(reach_of(len(facts)) / SHARE_STEP)
        whole = jnp.trunc(widened(inside) * most)
        total = jnp.sum(whole * np.float64(SHARE_STEP), axis=0)
        high, low = split_shares(total)
    return MetricSums(high, low, facts)


def measured(loss_fn: LossFn, has_aux: bool, metrics: Metrics) -> LossFn:
    """A loss that also gives the values of the metrics, and nothing else.

    Args:
        loss_fn: ``(params, example) -> loss``, or ``-> (loss, aux)``.
        has_aux: which of the two.
        metrics: from `as_metrics`.

    Returns:
        ``(params, example) -> (loss, values)`` with float32 values ``[metrics]``,
        centred and scaled, NaN where one is not finite; without metrics the loss alone.

    Raises:
        TypeError: when called, for a loss that returns no pair although it should.
        ValueError: when called, for a metric that is not one real number, or a loss
            that is none.

    Privacy: raw values of one example; `aux` ends here.

    Example:
        >>> loss = lambda w, x: (w * x, x)
        >>> metrics = as_metrics({"x": Metric(lambda loss, aux: aux, 0.0, 4.0)})
        >>> value, rest = measured(loss, True, metrics)(2.0, jnp.float32(3.0))
        >>> float(value), rest.tolist()
        (6.0, [0.5])
    """
    if not has_aux and not metrics:
        return loss_fn

    def whole(params: Params, example: Example) -> Any:
        found = loss_fn(params, example)
        loss, aux = _pair(found) if has_aux else (found, None)
        if not metrics:
            return loss
        leaves = jax.tree.leaves(loss)
        if [jnp.shape(x) for x in leaves] != [()]:
            raise no_scalar(leaves)
        loss_and_aux = jax.lax.stop_gradient((loss, aux))
        values = [_scaled(*item, *loss_and_aux) for item in metrics]
        return loss, jnp.stack(values)

    return whole


def _pair(found: Any) -> Sequence[Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(
            f"The loss returned {type(found).__name__}, but with has_aux=True it must "
            "return a pair (loss, aux)."
        )
    return found


def _scaled(name: str, metric: Metric, loss: Any, aux: Any) -> Array:
    """One metric of one example, in [-1, 1]; NaN where it is not finite."""
    value = metric.function(loss, aux)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(value)]
    if shapes != [()] or jnp.iscomplexobj(value):
        raise ValueError(
            f"The metric {name!r} of one example has shapes {shapes}, but must be one "
            "real number; reduce it."
        )
    value = jnp.asarray(value).astype(np.float32)
    low, high, middle, half = (
        np.float32(x) for x in (metric.low, metric.high, metric.middle, metric.half)
    )
    inside = (jnp.clip(value, low, high) - middle) / half
    return jnp.where(jnp.isfinite(value), inside, np.float32(np.nan))
