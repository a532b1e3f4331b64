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
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.accounting import moments
from dp_ilg.accounting.kinds import Kind, merged

_ADDED = 3e-3  # of epsilon, that the imagined release may cost at first
_ADDED_THEN = 4e-4
_SETTLED = 6e-4  # of epsilon: what a quarter of it may change, to be enough
_TRIES = 12
_CUT = 1e-5  # of delta, that all ends of all steps may cost
_ALIAS = 1e-5  # of delta, that the terms k other than 0 may add
_TAIL = 1e-7  # of delta, that terms beyond the last one may add
_MOST_TERMS = 2**18
_POINTS = 256  # summed at a time
_MOST_KINDS, _ROUGH_KINDS = 2048, 16
_BARE = 0.02  # noise below it hides nobody who takes part
_LEAST_TILT, _MOST_TILT = 1e-6, 1e12
_WIDER = np.array([1.03, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0])
_OTHER = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 0.6, 0.3])
_UNIT = moments.UNIT
_Kinds = tuple[moments.TiltedLoss, int]



class _Run(NamedTuple):
    """The steps of one run as one side of the neighbouring relation sees them."""

    parts: tuple[tuple[moments.Part, ...], ...]  # of each kind
    counts: tuple[int, ...]
    normal: float  # squared distance of all unsampled Gaussians together
    sensitivity: int
    removed: bool
    log_cut: float  # of P's mass at each end of each step

    def losses(self, tilt: float, frequency: float = 0.0) -> list[_Kinds] | None:
        """The tilted loss of every kind with its count, None if one cannot be had."""
        found = []
        order = moments.Order(self.sensitivity, self.removed, tilt, frequency)
        for parts, count in zip(self.parts, self.counts, strict=True):
            loss = moments.tilted_loss(parts, order, self.log_cut)
            if loss is None:
                return None
            found.append((loss, count))
        return found

    def cut(self, log_delta: float, share: float) -> _Run:
        """The run whose steps together lose a share of `_CUT` of delta at the ends."""
        ends = 3.0 * max(1, sum(self.counts)) / (share * _CUT)
        return self._replace(log_cut=log_delta - math.log(ends))

    def log_moment(self, tilt: float) -> float:
        """Log of E[exp(tilt L)], infinite where it cannot be had."""
        losses = self.losses(tilt)
        if losses is None:
            return math.inf
        sampled = sum(count * loss.log_moment for loss, count in losses)
        return sampled + 0.5 * self.normal * tilt * (1 + tilt)


class _Line(NamedTuple):
    """Where to sum, and what is known about it."""

    tilt: float
    period: float  # 2 pi over the distance of frequencies
    terms: int  # after the first
    normal: float  # squared distance of real and imagined Gaussians
    tail: float  # bound on the terms left out, as the sum is scaled


class _Terms(NamedTuple):
    """The sum at one epsilon e: exp(log_scale - tilt e) times what `at` computes."""

    line: _Line
    values: np.ndarray  # complex128[terms + 1]
    error: float
    mean: float
    log_scale: float


def epsilon(kinds: Sequence[Kind], delta: float, sensitivity: int) -> float:
    """Returns an upper bound on epsilon, tight to about 1 part in 10,000.

    Args:
        kinds: the steps, with noise multipliers above 0.
        delta: the delta of the guarantee, in (0, 1).
        sensitivity: 1 for an example added or removed, 2 for one replaced.

    Returns:
        The epsilon, at least 0.

    Raises:
        ValueError: where it is beyond what floating-point numbers hold.

    Privacy:
        Every step is taken for its dominating pair, see `renyi.step_divergences`; a cut
        draw for a mixture of two such pairs (`dp_ilg.accounting.truncation`).

    Example:
        >>> run = [Kind(0.01, z, (), 10_000) for z in (1.0, 0.99, 0.98)]
        >>> round(epsilon(run, 1e-5, 1), 2)
        12.08
        >>> round(epsilon(run, 1e-30, 1), 2)
        25.93

    Reference:
        See the module.
    """
    bare = [k for k in kinds if k.sampling_prob < 1 and k.noise_multiplier < _BARE]
    if not bare:
        return _sides(kinds, math.log(delta), sensitivity)
    rest = [kind for kind in kinds if kind not in bare]
    whole = [*rest, *(k._replace(sampling_prob=1.0, truncated=()) for k in bare)]
    found = _sides(whole, math.log(delta), sensitivity)
    stay_out = sum(kind.count * math.log1p(-kind.sampling_prob) for kind in bare)
    left = delta + math.expm1(stay_out) * (1 + 1e-12)
    if left > 0:
        found = min(found, _sides(rest, math.log(left), sensitivity))
    return found


def _sides(kinds: Sequence[Kind], log_delta: float, sensitivity: int) -> float:
    """The largest epsilon over directions and, with cut draws, over data sizes."""
    kinds = merged(kinds, _MOST_KINDS)
    directions = (True, False) if sensitivity == 1 else (True,)
    laws = (0, 1) if sensitivity == 1 and any(k.truncated for k in kinds) else (0,)
    found, tilt = 0.0, 0.0
    for removed in directions:
        for law in laws:
            run = _run(kinds, sensitivity, removed, law)
            few = _run(merged(kinds, _ROUGH_KINDS), sensitivity, removed, law)
            few = few.cut(log_delta, 1.0)
            tilts = [tilt * factor for factor in _OTHER if tilt]
            if any(_at_tilt(few, log_delta, one) <= found for one in tilts):
                continue  # not even its upper bound is above
            bound, tilt = _chernoff(few, log_delta)
            found = max(found, _side(run, few, log_delta, bound, tilt))
    return found


def rough_epsilon(kinds: Sequence[Kind], delta: float, sensitivity: int) -> float:
    """Returns an upper bound on epsilon from one order each way, within milliseconds.

    Args:
        kinds: as in `epsilon`.
        delta: as in `epsilon`.
        sensitivity: as in `epsilon`.

    Returns:
        A bound above `epsilon`, often by a tenth.

    Example:
        >>> run = [Kind(0.01, 1.0, (), 10_000)]
        >>> 1 < rough_epsilon(run, 1e-5, 1) / epsilon(run, 1e-5, 1) < 1.2
        True
    """
    found, few = 0.0, merged(kinds, _ROUGH_KINDS)
    for removed in (True, False) if sensitivity == 1 else (True,):
        for law in (0, 1):
            run = _run(few, sensitivity, removed, law).cut(math.log(delta), 1.0)
            found = max(found, _chernoff(run, math.log(delta))[0])
    return found


def _run(kinds: Sequence[Kind], sensitivity: int, removed: bool, law: int) -> _Run:
    sampled, counts, normal = [], [], 0.0
    for kind in kinds:
        q, z = kind.sampling_prob, kind.noise_multiplier
        if q == 1 and not kind.truncated:
            normal += kind.count * (sensitivity / z) ** 2
            continue
        parts = [(1.0, q, z)]
        if kind.truncated:
            cut, rate = kind.truncated[law]
            parts = [(1 - cut, q, z), (cut, rate, 0.5 * z)]
        sampled.append(tuple(part for part in parts if part[0] > 0))
        counts.append(kind.count)
    facts = tuple(sampled), tuple(counts), normal, sensitivity, removed
    return _Run(*facts, log_cut=-math.inf)


def _at_tilt(run: _Run, log_delta: float, tilt: float) -> float:
    """An upper bound on epsilon from a single real order, 1 + tilt.

    ``(1 - exp(-x)) exp(-t x)`` is largest where exp(-x) is t / (1 + t).
    """
    moment = run.log_moment(tilt)
    if math.isinf(moment):  # beyond reach: look at smaller ones
        return 1e250 * tilt
    found = (moment + _gain(tilt) - log_delta - math.log1p(-_CUT)) / tilt
    return max(0.0, found + 1e-9 * abs(found) + 1e-13 * sum(run.counts) / tilt)


def _chernoff(run: _Run, log_delta: float) -> tuple[float, float]:
    """The best of these bounds, and its tilt."""
    from scipy import optimize

    def at(log_tilt: float) -> float:
        return _at_tilt(run, log_delta, math.exp(log_tilt))

    bounds = (math.log(_LEAST_TILT), math.log(_MOST_TILT))
    best: Any = optimize.minimize_scalar(
        at, bounds=bounds, method="bounded", options={"xatol": 0.01}
    )
    return float(best.fun), math.exp(best.x)


def _gain(tilt: float) -> float:
    """Log of the largest (1 - exp(-x)) exp(-tilt x) over x."""
    return -tilt * math.log1p(1 / tilt) - math.log1p(tilt)


def _side(run: _Run, few: _Run, log_delta: float, bound: float, tilt: float) -> float:
    """Epsilon of one side: the line is fitted to an epsilon until that is the answer."""
    best, about, added, before = bound, bound, _ADDED, math.inf
    for _ in range(_TRIES):
        share = min(1.0, tilt * about)
        line = _line(few.cut(log_delta, share), tilt, log_delta, about, added)
        terms = line and _terms(run.cut(log_delta, share), line)
        if terms is None:
            break
        found = _solve(terms, log_delta + math.log1p(-share * _CUT), best)
        best = min(best, found)
        if found == 0 or before - found < _SETTLED * found:
            break
        if found > 0.9 * about:  # the line fits: see what less of the imagined gives
            before, added = found, added / 4
        elif found < 0.5 * about:
            tilt = _better_tilt(few, tilt, log_delta, found)
        added, about = min(added, _ADDED_THEN), best
    return best


def _better_tilt(run: _Run, tilt: float, log_delta: float, about: float) -> float:
    """The tilt that takes the fewest terms, among some around the given one."""

    def terms(one: float) -> float:
        line = _line(run, one, log_delta, about, _ADDED)
        return line.terms if line else math.inf

    return min((tilt * _OTHER).tolist(), key=terms)


def _line(run, tilt, log_delta, about, added) -> _Line | None:
    """Chooses distance and number of terms for an epsilon of `about`.

    None of this decides whether the result is valid, only how tight it is.
    """
    moment = run.log_moment(tilt)
    wider = [(t, run.log_moment(t)) for t in (tilt * _WIDER).tolist()]
    near = max(0.0, -math.log(tilt * about)) - math.log(_ALIAS)
    left = (near - log_delta) / tilt
    right = min(
        (m + _gain(t) - t * about - log_delta + near) / (t - tilt) for t, m in wider
    )
    period = max(left, right)
    normal = run.normal + 2 * added * about / (1 + tilt)
    scale = max(0.0, moment - tilt * about - log_delta)  # of terms over delta
    exponent = scale - math.log(_TAIL) + near
    reach = math.sqrt(2 * exponent / normal)
    needed = reach * period / (2 * math.pi)
    if not needed < _MOST_TERMS:
        return None
    terms = math.ceil(needed)
    reach = 2 * math.pi * terms / period
    size = 0.5 * normal * reach**2
    tail = math.exp(-size) / math.pi * min(1 / reach, 1 / (normal * reach**3))
    return _Line(tilt, period, terms, normal, tail)


def _terms(run: _Run, line: _Line) -> _Terms | None:
    """Everything of the terms that does not depend on epsilon, and their error."""
    step = 2 * math.pi / line.period
    frequencies = step * np.arange(line.terms + 1.0)
    losses = run.losses(line.tilt, float(frequencies[-1]))
    if losses is None:
        return None
    low, high, phases = (np.zeros(line.terms + 1) for _ in range(3))
    mean = (line.tilt + 0.5) * line.normal
    moved, log_scale = mean, 0.5 * line.normal * line.tilt * (1 + line.tilt)
    for loss, count in losses:
        centre = float(loss.weights @ loss.losses)
        values = _moments(loss, centre, step, line.terms)
        sizes, error = np.abs(values), loss.error + loss.turning * frequencies
        error += _UNIT * (abs(loss.log_moment) + _summed(len(loss.losses)))
        low += count * np.log(np.maximum(sizes, 1e-300))
        high += count * np.log(sizes + error)
        phases += count * np.angle(values)
        mean, moved = mean + count * centre, moved + count * abs(centre)
        log_scale += count * loss.log_moment
    decay = -0.5 * line.normal * frequencies**2
    points = line.tilt + 1j * frequencies
    halved = np.where(frequencies == 0, 0.5, 1.0) * 2 / line.period
    shares = halved / np.abs(points * (points + 1))
    sizes = np.exp(low + decay) * shares
    wrong = -np.expm1(low - high) * np.exp(high + decay) * shares
    slips = _UNIT * (4 * frequencies * moved + 2 * np.abs(phases) + 40)
    phases -= np.angle(points) + np.angle(points + 1)
    error = float(np.sum(wrong + slips * sizes)) * (1 + 1e-9) + line.tail
    return _Terms(line, sizes * np.exp(1j * phases), error, mean, log_scale)


def _moments(loss, centre: float, step: float, terms: int) -> np.ndarray:
    """E[exp(i f (L - centre))] of the tilted loss at f = 0, step, .. terms step."""
    block = math.isqrt(terms) + 1
    found = np.zeros((block, block), np.complex128)
    for first in range(0, len(loss.losses), _POINTS):
        part = slice(first, first + _POINTS)
        turns = step * (loss.losses[part] - centre)
        inner = np.exp(1j * np.outer(turns, np.arange(block)))
        outer = np.exp(1j * np.outer(block * np.arange(block), turns))
        found += (outer * loss.weights[part]) @ inner
    return found.ravel()[: terms + 1]


def _summed(points: int) -> float:
    """Roundings that a sum of products by blocks and then over blocks may pile up."""
    return _POINTS + points / _POINTS + 10


def _solve(terms: _Terms, log_delta: float, bound: float) -> float:
    """The epsilon at which the sum, with all that is charged, is delta."""
    from scipy import optimize

    tilt, values = terms.line.tilt, terms.values
    frequencies = 2 * math.pi / terms.line.period * np.arange(len(values))
    weights = np.abs(values)

    def excess(epsilon: float) -> float:
        """Log of the bound on delta(epsilon), less that of delta."""
        turned = np.exp(1j * frequencies * (terms.mean - epsilon))
        slip = 4 * _UNIT * float(frequencies @ weights) * epsilon
        total = float(np.sum((values * turned).real)) + terms.error + slip
        size = abs(terms.log_scale) + tilt * epsilon + abs(log_delta)
        exponent = terms.log_scale - tilt * epsilon - log_delta
        return math.log(total) + exponent + 4 * _UNIT * size

    if excess(0.0) <= 0:
        return 0.0
    if not excess(bound) < 0:
        return bound
    found = float(optimize.brentq(excess, 0.0, bound, xtol=1e-9 * bound, rtol=1e-9))
    for _ in range(60):
        if excess(found) <= 0:
            return found
        found += 1e-9 * bound
    return bound
