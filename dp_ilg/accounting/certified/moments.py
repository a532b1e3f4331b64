"""Moments of a step's privacy loss at complex orders, each with a bound on its error.

The loss L of a step is ``log(P/Q)`` of its dominating pair P, Q (`renyi`), mixtures of
normal distributions. Its moment ``E_P[exp(s L)]`` is an integral over a normal variable
t of powers of

    r(t) = 1 - q + q exp(a t - a^2 / 2),    a = 1 / noise multiplier.

*The ends.* Beyond two ends P has hardly any mass, but losses so large that their
moments explode. That mass is cut off, and charged to delta as if it disclosed all.

*Between them* Gauss' rule with 40 points integrates over short panels. Its error on a
panel of half width d is at most ``64 / 15 d M 4^-80 / (1 - 4^-2)`` if the integrand is
analytic and below M in the ellipse with foci at the panel's ends and half axes
17/8 d and Y = 15/8 d. At t + iy in it the normal density grows by exp(y^2 / 2), and
``|1 - q + w exp(iv)|^2 = (1 - q + w)^2 - 2 (1 - q) w (1 - cos v)`` gives

    r(t) cos(a y / 2) <= |r(t + iy)| <= r(t),
    |arg r(t + iy)| <= a y w(t) / cos(a y / 2),

where w(t) is the share of the example in r(t), as long as a y < pi. All grow or fall
with t, so M follows from the ends of the ellipse. Panels are as short as the sum of
these bounds needs to be negligible.

*Rounding* is bounded by the numbers of each term.

Reference:
    Trefethen, "Approximation theory and approximation practice", 2013, Theorem 19.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)
_LONG, _HIGH = 17 / 8, 15 / 8  # half axes of the ellipse whose axes add up to 4
_RULE = math.log(64 / 15 / (1 - 4.0**-2)) - 80 * math.log(4.0)
_QUADRATURE = -46.0  # log of the rule's error over the moment, about
_MOST_POINTS = 2**18
_NEGLIGIBLE = -45.0  # log of a term, relative to the largest, that is dropped
_CELLS = 400
UNIT = 2.0**-52  # twice the rounding of one operation

Part = tuple[float, float, float]  # share, sampling rate, noise multiplier


class Order(NamedTuple):
    """Whose moments, and which.

    Attributes:
        sensitivity: 1 if neighbours differ by an example added or removed, 2 if by one
            replaced (then `removed` makes no difference).
        removed: whether P is the side that has the example.
        tilt: the real part of the orders, above 0.
        frequency: the largest imaginary part.

    Example:
        >>> Order(1, True, 2.0).mixed
        True
    """

    sensitivity: int
    removed: bool
    tilt: float
    frequency: float = 0.0

    @property
    def mixed(self) -> bool:
        """Whether P is the mixture."""
        return self.removed or self.sensitivity == 2


class TiltedLoss(NamedTuple):
    """The loss of a step on points, tilted to ``exp(tilt loss)`` and normalised.

    Attributes:
        losses: float64[points].
        weights: float64[points], at least 0, sum 1.
        log_moment: the log of E[exp(tilt loss)] between the ends.
        log_error: bounds the error of log_moment.
        weight_error: float64[points], of the weights, relative.
        turning: error of a mean of exp(i frequency losses), for each unit of frequency.
        error: error of such a mean that does not vanish with the frequency.

    Example:
        >>> found = tilted_loss([(1.0, 0.1, 2.0)], Order(1, True, 2.0), -40.0)
        >>> found.log_error < 1e-12
        True
    """

    losses: np.ndarray
    weights: np.ndarray
    log_moment: float
    log_error: float
    weight_error: np.ndarray
    turning: float
    error: float


class _Terms(NamedTuple):
    losses: np.ndarray
    logs: np.ndarray
    error: np.ndarray  # relative, of each term, but for that of its loss
    turning: np.ndarray  # absolute, of each loss
    log_rest: float  # of what lies outside the panels, and of the rule's error


def tilted_loss(
    parts: Sequence[Part], order: Order, log_cut: float
) -> TiltedLoss | None:
    """Puts the loss of a step on points that serve all orders up to a frequency.

    Args:
        parts: (share, q, z) of the steps of which it is one, by a coin whose result is
            told; one of share 1 for plain Poisson sampling.
        order: of the moments.
        log_cut: the log of a third of the mass of P that may be cut off, below -1.

    Returns:
        The tilted loss; None where more than 262,144 points would be needed, which
        means hardly any noise.

    Example:
        >>> found = tilted_loss([(1.0, 0.1, 2.0)], Order(1, True, 1.0), -40.0)
        >>> round(found.log_moment, 4)  # the Renyi divergence of order 2
        0.0028
    """
    terms = []
    for share, q, z in parts:
        found = _terms(q, 1 / z, order, log_cut)
        if found is None:
            return None
        terms.append(found._replace(logs=found.logs + math.log(share)))
    losses, logs, error, turning = (
        np.concatenate(x) for x in list(zip(*terms, strict=True))[:4]
    )
    top = float(logs.max())
    weights = np.exp(logs - top)
    total = float(weights.sum())
    weights /= total
    kept = logs > top + _NEGLIGIBLE
    still = float(weights[~kept].sum())
    still += sum(math.exp(one.log_rest - top) for one in terms) / total
    mean_error = float(weights @ error) + order.tilt * float(weights @ turning)
    log_moment, log_error = top + math.log(total), mean_error + 1e-13
    heights = order.tilt * losses
    if heights.max() < 50.0:  # from 1, which is the whole mass of P: exact if close
        grown = np.exp(logs - heights) * np.expm1(heights)
        log_moment = math.log1p(float(grown.sum()))
        roundings = error + (math.sqrt(len(logs)) + 60) * UNIT
        log_error = float(np.abs(grown) @ roundings) * math.exp(-log_moment)
        log_error += order.tilt * float(weights @ turning) + 3 * math.exp(log_cut)
        log_error += 4 * UNIT * abs(log_moment)
    kept_errors = error + order.tilt * turning + mean_error
    return TiltedLoss(
        losses[kept],
        weights[kept],
        log_moment,
        log_error + still,
        kept_errors[kept],
        float(weights @ turning),
        4 * still,
    )


def _terms(q: float, a: float, order: Order, log_cut: float) -> _Terms | None:
    """The points of one part: panels are made shorter until the rule is exact."""
    low, high = _ends(q, a, order, log_cut)
    t = np.linspace(low, high, _CELLS + 1)
    most = _log_most(t[:-1], t[1:], q, a, order) + math.log(t[1] - t[0])
    seen = np.flatnonzero(most > _at(t, q, a, order).logs.max() + 1.4 * _NEGLIGIBLE)
    outside = np.concatenate([most[: seen[0]], most[seen[-1] + 1 :], [-math.inf]])
    log_rest = float(np.logaddexp.reduce(outside))
    ends = float(t[seen[0]]), float(t[seen[-1] + 1])
    panels = _panels(q, a, order, ends)
    if panels is None:
        return None
    middle, half, log_wrong = panels
    log_rest = float(np.logaddexp(log_rest, log_wrong))
    points = (middle[:, None] + half[:, None] * _NODES).ravel()
    widths = np.log((half[:, None] * _WEIGHTS).ravel())
    found = _at(points, q, a, order)
    return found._replace(logs=found.logs + widths, log_rest=log_rest)


def _ends(q, a, order: Order, log_cut: float) -> tuple[float, float]:
    """Beyond each of them P has no more mass than is cut off, or twice that."""
    from scipy import special

    far = -float(special.ndtri_exp(log_cut))
    if not order.mixed:
        return -far, far
    log_rest = log_cut - math.log(q)
    moved = -float(special.ndtri_exp(log_rest)) if log_rest < -0.7 else 0.0
    return -far, max(far, a + moved)


def _panels(q, a, order: Order, ends) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Middles and halves of panels, cut in two until the rule is exact, and its error.

    That error is the log of a bound, and added up over the panels.
    """
    t = np.linspace(ends[0], ends[1], _CELLS + 1)
    share = _share(q, a, t)
    if order.sensitivity == 2:
        share = share + _share(q, a, -t)
    slope = a * share * (order.frequency + 1 + order.tilt)
    density = max(0.4, 0.8 * a) + slope / 50
    least = _log_least(t, q, a, order)
    pieces = 0.5 * (density[1:] + density[:-1]) * np.diff(t)
    count = np.concatenate([[0.0], np.cumsum(pieces)])
    panels = math.ceil(count[-1])
    if not panels * len(_NODES) < _MOST_POINTS:
        return None
    edges = np.interp(np.linspace(0, count[-1], panels + 1), count, t)
    half, middle = 0.5 * np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    while len(half) * len(_NODES) < _MOST_POINTS:
        wrong = _log_wrong(middle, half, q, a, order)
        bad = wrong > _QUADRATURE + least - math.log(len(half))
        if not bad.any():
            return middle, half, float(np.logaddexp.reduce(wrong))
        quarter = 0.5 * half[bad]
        moved = (middle[bad] - quarter, middle[bad] + quarter)
        middle = np.concatenate([middle[~bad], *moved])
        half = np.concatenate([half[~bad], quarter, quarter])
    return None


def _log_least(t: np.ndarray, q: float, a: float, order: Order) -> float:
    """Log of about the tilted mass between points: a sum over a cell's worse end."""
    logs = _at(t, q, a, order).logs
    worse = np.minimum(logs[1:], logs[:-1])
    return float(np.logaddexp.reduce(worse)) + math.log(t[1] - t[0])


def _log_wrong(middle, half, q, a, order: Order) -> np.ndarray:
    """Log of the bound on the rule's error on each panel."""
    high = _HIGH * half
    left, right = middle - _LONG * half, middle + _LONG * half
    cosine = np.cos(np.minimum(0.5 * a * high, 1.57))
    turn = _share(q, a, right)
    if order.sensitivity == 2:
        turn = turn + _share(q, a, -left)
    bound = _log_most(left, right, q, a, order) + 0.5 * high**2
    bound += order.frequency * a * high * turn / cosine
    if order.sensitivity == 2 or not order.mixed:  # where r is in a denominator
        bound -= order.tilt * np.log(cosine)
    return bound + np.log(half) + _RULE


def _log_most(left, right, q, a, order: Order) -> np.ndarray:
    """A bound on the log of the tilted density between two points of the real line."""
    nearest = np.maximum(0.0, np.maximum(left, -right))
    found = -0.5 * nearest**2 - 0.5 * math.log(2 * math.pi) + 1e-9
    if not order.mixed:
        return found - order.tilt * _log_ratio(q, a, left)[0]
    found += (1 + order.tilt) * _log_ratio(q, a, right)[0]
    if order.sensitivity == 2:
        found -= order.tilt * _log_ratio(q, a, -right)[0]
    return found


def _at(t: np.ndarray, q: float, a: float, order: Order) -> _Terms:
    """The tilted density at some points, and what rounding may do to it."""
    ours, our_error = _log_ratio(q, a, t)
    losses, loss_error = (ours if order.removed else -ours), our_error
    if order.sensitivity == 2:
        theirs, their_error = _log_ratio(q, a, -t)
        losses, loss_error = ours - theirs, our_error + their_error
    base = ours if order.mixed else 0.0 * ours
    half = 0.5 * t * t
    logs = base + order.tilt * losses - half - 0.5 * math.log(2 * math.pi)
    sizes = half + np.abs(base) + order.tilt * np.abs(losses) + 8
    error = 2 * UNIT * sizes + order.mixed * our_error
    turning = loss_error + 4 * UNIT * np.abs(losses)
    return _Terms(losses, logs, error, turning, -math.inf)


def _share(q: float, a: float, t: np.ndarray) -> np.ndarray:
    """What the example has of the mixture's density at t."""
    if q == 1:
        return np.ones_like(t)
    odds = math.log(q) - math.log1p(-q) + a * t - 0.5 * a * a
    return 1 / (1 + np.exp(-np.clip(odds, -700, 700)))


def _log_ratio(q: float, a: float, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of 1 - q + q exp(u), u = a t - a^2 / 2, and a bound on its error."""
    u = a * t - 0.5 * a * a
    if q == 1:
        return u, 2 * UNIT * (np.abs(a * t) + 0.5 * a * a)
    low = np.minimum(u, 30.0)
    grown = q * np.expm1(low)
    value = np.log1p(grown)
    high = u > 30.0
    if high.any():
        over = u[high]
        value[high] = math.log(q) + over + np.log1p((1 - q) / q * np.exp(-over))
    whole = 1 + grown
    share = q * np.exp(low) / whole
    inner = 2 * np.abs(grown) / whole + share * (np.abs(a * t) + 0.5 * a * a)
    return value, UNIT * (2 * np.abs(value) + inner + high * abs(math.log(q)))
