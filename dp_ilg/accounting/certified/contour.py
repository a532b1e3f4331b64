"""Epsilon by a sum along a line in the complex plane that can only round up.

Let L be the privacy loss of the whole run, a sum of independent losses of steps, and
M(s) = E[exp(s L)]. What is sought, ``delta(e) = E[(1 - exp(e - L))_+]``, has the
transform M(s) / (s (s + 1)) for s with a positive real part. Sum it over points
``s_j = t + i j h`` of the line with real part t:

    h / (2 pi) sum_j M(s_j) exp(-s_j e) / (s_j (s_j + 1))
        = sum_k exp(2 pi k t / h) delta(e + 2 pi k / h)

by Poisson's formula. The term k = 0 is delta(e) and none is negative, so *the sum is
never below delta*, however coarse h is; losses are put on no grid. It is as precise for
a delta of 1e-30 as for 1e-2, since t is chosen where the sum does not cancel.

What else could make the result too small is bounded and added:

- *the infinite sum*. Imagine that the run also releases something it does not, a normal
  variable of a tiny squared distance m. More released means more delta, never less, and
  M(s) gets a factor exp(m s (s + 1) / 2) that decays along the line whatever the run
  does. Terms beyond the last one add up to less than an integral of that factor. Real
  releases without sampling count towards m.
- *ends* of steps: losses so rare that delta hardly sees them, but so large that moments
  explode, are cut off; their probability is subtracted from delta.
- *moments* of steps: quadrature and rounding, see `moments`. With errors e_i of the
  moments and T_i steps of kind i, the product is off by no more than
  prod (|M_i| + e_i)^T_i - prod |M_i|^T_i.
- *rounding* of the sum.

Reference:
    Alghamdi et al., "The saddle-point method in differential privacy", ICML 2023 (the
    line and its real part); Zhu, Dong and Wang, "Optimal accounting of differential
    privacy via characteristic function", AISTATS 2022; Abate and Whitt, "The
    Fourier-series method for inverting transforms of probability distributions", 1992.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.accounting.certified import moments
from dp_ilg.accounting.certified.runs import Run, gain

_ALIAS = 1e-5  # of delta, that the terms k other than 0 may add
_TAIL = 1e-6  # of delta, that terms beyond the last one may add
_MOST_TERMS = 2**18
_POINTS = 256  # summed at a time
_MARKS = 60
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 11)]  # of sin x - x
_WIDER = np.array([1.03, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0])
_UNIT = moments.UNIT


class Line(NamedTuple):
    """Where to sum, and what is known about it.

    Attributes:
        tilt: the real part.
        period: 2 pi over the distance of frequencies.
        terms: how many, after the first.
        normal: squared distance of real and imagined Gaussians together.
        tail: bound on the terms left out, as the sum is scaled.
        size: log of the first term over delta, about.
    """

    tilt: float
    period: float
    terms: int
    normal: float
    tail: float
    size: float


class Terms(NamedTuple):
    """The sum's terms, but for the factor ``exp(log_scale - s_j epsilon)``.

    Attributes:
        line: where they lie.
        values: complex128[terms + 1].
        error: bounds what their sum is too small.
        mean: of the normal loss, whose phase is not in `values`.
        log_scale: log of M at the tilt, rounded up.
    """

    line: Line
    values: np.ndarray
    error: float
    mean: float
    log_scale: float


def fitted(
    run: Run, tilt: float, log_delta: float, about: float, added: float
) -> Line | None:
    """Chooses distance and number of terms for an epsilon of `about`.

    None of this decides whether the result is valid, only how tight it is.

    Args:
        run: with its ends cut for this delta.
        tilt: the real part of the line.
        log_delta: log of delta.
        about: an epsilon near the one sought, above 0.
        added: the share of it that the imagined release may cost, roughly.

    Returns:
        The line; None where it would take more than 262,144 terms.

    Example:
        >>> from dp_ilg.accounting.kinds import Kind
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0).cut(-11.5, 1.0)
        >>> line = fitted(run, 6.0, -11.5, 2.1, 1e-4)
        >>> 100 < line.terms < 10_000
        True
    """
    moment = run.log_moment(tilt)
    wider = [(t, run.log_moment(t)) for t in (tilt * _WIDER).tolist()]
    small = max(0.0, -math.log(tilt * about))
    near = small - math.log(_ALIAS)
    left = (near - log_delta) / tilt
    right = min(
        (m + gain(t) - t * about - log_delta + near) / (t - tilt) for t, m in wider
    )
    period = max(left, right)
    normal = run.normal + 2 * added * about / (1 + tilt)
    scale = max(0.0, moment - tilt * about - log_delta)  # of terms over delta
    exponent = scale - math.log(_TAIL) + small
    reach = math.sqrt(2 * exponent / normal)
    needed = reach * period / (2 * math.pi)
    if not needed < _MOST_TERMS:
        return None
    terms = math.ceil(needed)
    reach = 2 * math.pi * terms / period
    size = 0.5 * normal * reach**2
    tail = math.exp(-size) / math.pi * min(1 / reach, 1 / (normal * reach**3))
    size_first = moment - tilt * about - log_delta
    size_first -= math.log(period * tilt * (1 + tilt))
    return Line(tilt, period, terms, normal, tail, size_first)


def summed(run: Run, line: Line) -> Terms | None:
    """Everything of the terms that does not depend on epsilon, and their error.

    Args:
        run: with its ends cut for some delta.
        line: where to sum.

    Returns:
        The terms; None where a step's loss would take too many points.

    Example:
        >>> from dp_ilg.accounting.kinds import Kind
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0).cut(-11.5, 1.0)
        >>> terms = summed(run, fitted(run, 6.0, -11.5, 2.1, 1e-4))
        >>> bool(terms.error < 1e-6 * abs(terms.values[0]))
        True
    """
    step = 2 * math.pi / line.period
    frequencies = step * np.arange(line.terms + 1.0)
    losses = run.losses(line.tilt, float(frequencies[-1]))
    if losses is None:
        return None
    low, high, phases = (np.zeros(line.terms + 1) for _ in range(3))
    mean = (line.tilt + 0.5) * line.normal
    log_scale, log_error = 0.5 * line.normal * line.tilt * (1 + line.tilt), 0.0
    for loss, count in losses:
        excess: Any = _excess(loss, step, line.terms)
        sizes = np.abs(1 + excess)
        near = np.maximum(2 * excess.real + np.abs(excess) ** 2, -0.5)
        gained = np.where(sizes > 0.75, 0.5 * np.log1p(near), np.log(_floor(sizes)))
        low += count * gained
        wrong = _error(loss, frequencies) + 4 * _UNIT * (sizes < 0.75)
        high += count * (gained + np.log1p(wrong / _floor(sizes)))
        phases += count * np.arctan2(excess.imag, 1 + excess.real)
        log_scale += count * loss.log_moment
        log_error += count * (loss.log_error + 2 * _UNIT * abs(loss.log_moment))
    decay = -0.5 * line.normal * frequencies**2
    points = line.tilt + 1j * frequencies
    halved = np.where(frequencies == 0, 0.5, 1.0) * 2 / line.period
    shares = halved / np.abs(points * (points + 1))
    sizes = np.exp(low + decay) * shares
    wrong = -np.expm1(low - high) * np.exp(high + decay) * shares
    slips = _UNIT * (4 * frequencies * mean + 2 * np.abs(phases) + 40)
    phases -= np.angle(points) + np.angle(points + 1)
    error = float(np.sum(wrong + slips * sizes)) * (1 + 1e-9) + line.tail
    return Terms(line, sizes * np.exp(1j * phases), error, mean, log_scale + log_error)


def _excess(loss: moments.TiltedLoss, step: float, terms: int) -> np.ndarray:
    """E[exp(i f L)] - 1 of the tilted loss at f = 0, step, .. terms step.

    ``exp(i (f + g) L) - 1`` is the product of the two less 1, plus each less 1: small
    numbers throughout, where one step says little, so that rounding is small too.
    Where f L stays small, its mean is set apart and only the rest, of second order, is
    summed this way.
    """
    block = math.isqrt(terms) + 1
    found = np.zeros((block, block), np.complex128)
    near = _near(loss, step * terms)
    for some, rest in ((near, True), (~near, False)):
        losses, weights = step * loss.losses[some], loss.weights[some]
        for first in range(0, len(losses), _POINTS):
            part = slice(first, first + _POINTS)
            fine = np.outer(losses[part], np.arange(block))
            coarse = np.outer(block * np.arange(block), losses[part])
            inner, outer = _turned(fine), _turned(coarse) * weights[part]
            found += outer @ inner
            if rest:
                inner, outer = _bent(fine), _bent(coarse) * weights[part]
            found += outer.sum(axis=1)[:, None] + weights[part] @ inner
    mean = math.fsum((loss.weights * loss.losses)[near].tolist())
    return found.ravel()[: terms + 1] + 1j * step * mean * np.arange(terms + 1)


def _near(loss: moments.TiltedLoss, frequency: float) -> np.ndarray:
    """Which losses turn little, up to a frequency."""
    return frequency * np.abs(loss.losses) < 1


def _turned(angle: np.ndarray) -> np.ndarray:
    """exp(i angle) - 1, to full relative precision."""
    half = np.sin(0.5 * angle)
    return -2 * half * half + 1j * np.sin(angle)


def _bent(angle: np.ndarray) -> np.ndarray:
    """exp(i angle) - 1 - i angle to full relative precision, for angles up to 1."""
    half, square = np.sin(0.5 * angle), angle * angle
    series = np.full_like(angle, _SINE[-1])
    for one in _SINE[-2::-1]:
        series = one + square * series
    return -2 * half * half + 1j * (angle * square * series)


def _error(loss: moments.TiltedLoss, frequencies: np.ndarray) -> np.ndarray:
    """What `_excess` may be off.

    With x = f |L|: an error of a weight counts at most min(2, x); products and sums of
    a block round what is at most x^2 / 2 where the mean is set apart and min(8, 2 x)
    elsewhere; angles and the mean round by a few units of x.
    """
    near, sizes = _near(loss, float(frequencies[-1])), np.abs(loss.losses)
    rounding = 1.5 * _UNIT * (_POINTS + len(sizes) / _POINTS + 30)
    marks = frequencies[-1] * 1.25 ** np.arange(-_MARKS, 1.0)
    found = np.zeros(_MARKS + 1)
    for first in range(0, len(sizes), _POINTS):
        part = slice(first, first + _POINTS)
        x = np.outer(sizes[part], marks)
        rounded = np.where(near[part, None], 0.5 * x * x, np.minimum(8.0, 2 * x))
        weights = loss.weights[part]
        found += (weights * loss.weight_error[part]) @ np.minimum(2.0, x)
        found += rounding * (weights @ rounded)
    above = np.searchsorted(marks, frequencies * (1 - 1e-9)).clip(0, _MARKS)
    turning = loss.turning + 8 * _UNIT * float(loss.weights @ sizes)
    return found[above] * (frequencies > 0) + loss.error + frequencies * turning


def _floor(sizes: np.ndarray) -> np.ndarray:
    return np.maximum(sizes, 1e-150)


def solve(terms: Terms, log_delta: float, bound: float) -> float:
    """The epsilon at which the sum, with all that is charged, is delta.

    Args:
        terms: of the line.
        log_delta: log of delta, less what the ends of steps cost.
        bound: a known upper bound on epsilon.

    Returns:
        An upper bound on epsilon, at most `bound`.

    Example:
        >>> from dp_ilg.accounting.kinds import Kind
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0).cut(-11.5, 1.0)
        >>> terms = summed(run, fitted(run, 6.0, -11.5, 2.1, 1e-4))
        >>> round(solve(terms, -11.5001, 3.0), 2)
        1.83
    """
    from scipy import optimize

    tilt, values = terms.line.tilt, terms.values
    frequencies = 2 * math.pi / terms.line.period * np.arange(len(values))
    weights = np.abs(values)

    def excess(epsilon: float) -> float:
        """Log of the bound on delta(epsilon), less that of delta."""
        turned: Any = values * np.exp(1j * frequencies * (terms.mean - epsilon))
        slip = 4 * _UNIT * float(frequencies @ weights) * epsilon
        total = float(np.sum(turned.real)) + terms.error + slip
        size = abs(terms.log_scale) + tilt * epsilon + abs(log_delta)
        exponent = terms.log_scale - tilt * epsilon - log_delta
        return math.log(total) + exponent + 4 * _UNIT * size

    if excess(0.0) <= 0:
        return 0.0
    if not excess(bound) < 0:
        return bound
    root: Any = optimize.brentq(excess, 0.0, bound, xtol=1e-9 * bound)
    found = float(root)
    for _ in range(60):
        if excess(found) <= 0:
            return found
        found += 1e-9 * bound
    return bound


def slope(terms: Terms, epsilon: float) -> tuple[float, float]:
    """How fast delta falls with epsilon, and what the errors charged make of epsilon.

    Args:
        terms: as in `solve`.
        epsilon: what `solve` found, above 0.

    Returns:
        The slope of -log delta, and which share of epsilon is due to errors; both
        about, and infinite where the errors are all there is.

    Example:
        >>> from dp_ilg.accounting.kinds import Kind
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0).cut(-11.5, 1.0)
        >>> terms = summed(run, fitted(run, 6.0, -11.5, 2.1, 1e-4))
        >>> falls, blurred = slope(terms, 1.83)
        >>> 6 < falls < 9 and blurred < 1e-6
        True
    """
    frequencies = 2 * math.pi / terms.line.period * np.arange(len(terms.values))
    turned: Any = terms.values * np.exp(1j * frequencies * (terms.mean - epsilon))
    total = float(np.sum(turned.real))
    falls = terms.line.tilt * total - float(frequencies @ turned.imag)
    if total <= 0 or falls <= 0:
        return math.inf, math.inf
    return falls / total, terms.error / (falls * epsilon)
