"""Epsilon of a million steps: losses composed as products of their spectra.

The loss of a run is a sum of independent losses on one grid, so its spectrum is the
product of theirs: a stage of many steps is a power, a thousand stages are a thousand
factors. The sum is smooth, so that few low frequencies matter; what the others could
add is bounded and charged. Before that every distribution is tilted towards large
losses, which makes probabilities of 1e-5 or 1e-20 as precise as large ones.

What is returned is an upper bound: the grid (`loss_pairs`), losses beyond it, losses
beyond the period of the transform, neglected frequencies and the rounding of numbers
all count against us.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.accounting import loss_pairs
from dp_ilg.accounting.kinds import Kind

_RELATIVE_ERROR = 1.5e-4
_GRIDS = 4  # tried at most, each valid
_LOG_TAIL = math.log(1e-7)  # of delta: what may lie above the grid
_BEYOND = -20.0  # the log probability of a tilted loss beyond the period
_MOST_EXPONENT = 600.0
_MOST_PLACES = 2**21
_MOST_KINDS = 2048
_BLOCK = 256  # frequencies at a time
_WITNESSES = 16
_ROUNDING = 1e-14  # of one step's spectrum, relative
_NEGLECTED = 1e-12


class _Tilted(NamedTuple):
    """Losses of every kind, tilted by ``exp(tilt * loss)`` and normalised."""

    places: np.ndarray  # int64[points]: multiples of the unit
    unit: float
    counts: np.ndarray  # [kinds]
    probabilities: np.ndarray  # [kinds, points]
    log_scale: float  # the log of what the tilting took out, over all steps
    tilt: float

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the sum of all tilted losses."""
        losses = self.places * self.unit
        mean = self.probabilities @ losses
        square = self.probabilities @ losses**2
        return float(self.counts @ mean), float(self.counts @ (square - mean**2))


def epsilon(
    kinds: Sequence[Kind], delta: float, sensitivity: int, bound: float
) -> float:
    """Returns an upper bound on epsilon, tight to about a few parts in 10,000.

    Args:
        kinds: the steps.
        delta: the delta of the guarantee, in (0, 1).
        sensitivity: 1 for an example added or removed, 2 for one replaced.
        bound: a known upper bound on epsilon, for the grid.

    Returns:
        The epsilon, at least 0 and at most `bound`.

    Privacy:
        Every step is taken for its dominating pair, see `renyi.step_divergences`; a cut
        draw for a mixture of two such pairs (`dp_ilg.accounting.truncation`).

    Example:
        >>> run = [Kind(0.01, z, 0.0, 10_000) for z in (1.0, 0.99, 0.98)]
        >>> round(epsilon(run, 1e-5, 1, bound=20.0), 2)
        12.08

    Reference:
        Koskela, Jaelkoe, Honkela, "Computing tight differential privacy guarantees
        using FFT", AISTATS 2020; Alghamdi et al., "The saddle-point method in
        differential privacy", ICML 2023, for the tilt.
    """
    kinds = merged(kinds, _MOST_KINDS)
    if _reach(kinds, delta, sensitivity) > _MOST_EXPONENT:
        return bound
    sides = (True, False) if sensitivity == 1 else (True,)
    found = [_side(kinds, delta, sensitivity, side, bound) for side in sides]
    return min(max(0.0, *found), bound)


def merged(kinds: Sequence[Kind], most: int) -> list[Kind]:
    """Makes fewer kinds of many: noise multipliers are rounded down to a common one.

    Args:
        kinds: the steps.
        most: how many noise multipliers there may be for one rate.

    Returns:
        Kinds that have at most the noise of those given, hence at least their epsilon.

    Example:
        >>> merged([Kind(0.1, z, 0.0, 1) for z in (1.0, 1.01, 2.0)], 2)
        [Kind(sampling_prob=0.1, noise_multiplier=1.0, truncated=0.0, count=2), \
Kind(sampling_prob=0.1, noise_multiplier=2.0, truncated=0.0, count=1)]
    """
    groups: dict[tuple[float, float], list[Kind]] = {}
    for kind in sorted(kinds):
        groups.setdefault((kind.sampling_prob, kind.truncated), []).append(kind)
    found = []
    for group in groups.values():
        if len(group) <= most:
            found += group
            continue
        noise = np.array([kind.noise_multiplier for kind in group])
        edges = np.geomspace(noise.min(), noise.max(), most)
        bins = np.searchsorted(edges, noise * (1 + 1e-12), side="right")
        for one in np.unique(bins):
            part = [group[i] for i in np.flatnonzero(bins == one)]
            count = sum(kind.count for kind in part)
            found.append(part[0]._replace(count=count))  # sorted: the least noise
    return found


def _side(
    kinds: list[Kind], delta: float, sensitivity: int, removed: bool, bound: float
) -> float:
    """Epsilon of one direction: the example removed (P has it) or added."""
    steps = sum(kind.count for kind in kinds)
    counts = np.array([kind.count for kind in kinds], np.float64)
    unit = math.sqrt(max(bound, 1e-3) / steps) / 100
    for _ in range(_GRIDS):
        places, raw, infinite = _on_grid(kinds, delta, sensitivity, removed, unit)
        tilted = _tilt(places, unit, counts, raw, delta)
        start, size = _period(tilted)
        best = _best_unit(tilted, delta, size)
        if 0.7 < best / unit < 1.4:
            break
        unit = best
    masses = _composed(tilted, start, size)
    lost = float(counts @ infinite)
    found = _solve(tilted, masses, start, delta * (1 - 1e-9) - lost)
    return found + 1e-12 * steps  # what the rounding of losses may have moved


def _best_unit(tilted: _Tilted, delta: float, size: int) -> float:
    """The coarsest unit that is fine enough, unless that takes too many places.

    A cell of width w adds ``tilt (1 + tilt) w^2 / 12`` to the log moment of a step, as
    losses that are uniform in the cell would; and epsilon is about the log moment of
    all steps and of 1 / delta over the tilt.
    """
    about = (tilted.log_scale - math.log(delta)) / tilted.tilt
    wanted = 12 * _RELATIVE_ERROR * about / tilted.counts.sum() / (1 + tilted.tilt)
    return max(math.sqrt(wanted), tilted.unit * size / _MOST_PLACES)


def _reach(kinds: list[Kind], delta: float, sensitivity: int) -> float:
    """The loss that a step of any kind hardly ever exceeds."""
    log_tail = _LOG_TAIL + math.log(delta) - math.log(sum(k.count for k in kinds))
    return max(
        loss_pairs.largest_loss(q, z / (2 if cut else 1), sensitivity, log_tail)
        for q, z, cut, _ in kinds
    )


def _on_grid(kinds, delta, sensitivity, removed, unit):
    """Grid points, probabilities [kinds, points] and infinities [kinds]."""
    steps = np.array([kind[:2] for kind in kinds])
    cut = np.array([kind.truncated for kind in kinds])
    places = loss_pairs.grid(unit, _reach(kinds, delta, sensitivity))
    points = places * unit
    raw, infinite = loss_pairs.step_losses(points, steps, sensitivity, removed)
    if cut.any():
        worse = loss_pairs.step_losses(points, steps * [1, 0.5], sensitivity, removed)
        raw = (1 - cut[:, None]) * raw + cut[:, None] * worse[0]
        infinite = (1 - cut) * infinite + cut * worse[1]
    return places, raw, infinite


def _tilt(places, unit, counts, raw, delta) -> _Tilted:
    """Tilts to where the sum of the losses is about the epsilon that is sought."""
    from scipy import optimize

    losses = places * unit

    def log_moments(tilt: float) -> tuple[np.ndarray, float]:
        top = tilt * max(losses[-1], 0.0)
        return raw @ np.exp(tilt * losses - top), top

    def excess(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        moments, top = log_moments(tilt)
        with np.errstate(divide="ignore"):
            total = float(counts @ (np.log(moments) + top))
        return (total - math.log(delta)) / tilt

    steepest = math.log(_MOST_EXPONENT / losses[-1])
    best: Any = optimize.minimize_scalar(
        excess, bounds=(-12, steepest), method="bounded"
    )
    tilt = math.exp(float(best.x))
    moments, top = log_moments(tilt)
    probabilities = raw * np.exp(tilt * losses - top) / moments[:, None]
    scale = float(counts @ (np.log(moments) + top))
    return _Tilted(places, unit, counts, probabilities, scale, tilt)


def _period(tilted: _Tilted) -> tuple[int, int]:
    """First place and number of places of the period.

    By Chernoff's bound a tilted loss lies above it (or below) with a probability of at
    most ``exp(_BEYOND)``. Such losses come back at the other end, where they count too
    much (from below) or must be charged (from above).
    """
    from scipy import fft

    losses = tilted.places * tilted.unit
    mean, variance = tilted.moments()
    steepest = _MOST_EXPONENT / losses[-1]
    slopes = np.minimum(np.array([0.5, 1, 2, 4, 6, 9]) / math.sqrt(variance), steepest)
    reaches = []
    for sign in (1, -1):
        distances = []
        for slope in slopes * sign:
            top = float(np.max(slope * losses))
            moments = tilted.probabilities @ np.exp(slope * losses - top)
            total = float(tilted.counts @ (np.log(moments) + top))
            distances.append((total - slope * mean - _BEYOND) / abs(slope))
        reaches.append(min(distances))
    places = 2 * math.ceil(max(reaches) / tilted.unit) + 2
    size = fft.next_fast_len(places, real=True) or places
    return round((mean - max(reaches)) / tilted.unit), size


def _composed(tilted: _Tilted, start: int, size: int) -> np.ndarray:
    """Upper bounds on the tilted probabilities of `size` places from `start` on."""
    from scipy import fft

    used, neglected = _frequencies(tilted, size)
    spectrum = np.zeros(size // 2 + 1, np.complex128)
    if used * len(tilted.places) < 10 * size:  # few frequencies: one by one
        for first in range(0, used, _BLOCK):
            block = np.arange(first, min(first + _BLOCK, used))
            spectrum[block] = _some(tilted, block, size)
    else:
        spectrum, used = _all(tilted, size), len(spectrum)
    masses = np.asarray(fft.irfft(spectrum, size))
    error = _ROUNDING * float(tilted.counts.sum()) * used + neglected
    return np.roll(np.maximum(masses, 0) + 2 * error / size, -(start % size))


def _frequencies(tilted: _Tilted, size: int) -> tuple[int, float]:
    """How many frequencies are needed, and what the others sum up to at most.

    Each factor of the product is at most 1, so that of a few kinds bounds it.
    """
    losses = tilted.places * tilted.unit
    spread = tilted.probabilities @ losses**2 - (tilted.probabilities @ losses) ** 2
    logs = np.zeros(size // 2 + 1)
    for kind in np.argsort(-tilted.counts * spread)[:_WITNESSES]:
        size_of = np.abs(_transform(tilted, int(kind), size)) + 1e-13
        logs += tilted.counts[kind] * np.minimum(np.log(size_of), 0)
    rest = np.cumsum(np.exp(logs)[::-1])[::-1]
    used = int(np.searchsorted(-rest, -_NEGLECTED))
    return used, float(rest[used]) if used < len(rest) else 0.0


def _transform(tilted: _Tilted, kind: int, size: int) -> np.ndarray:
    from scipy import fft

    places, weights = tilted.places % size, tilted.probabilities[kind]
    return np.asarray(fft.rfft(np.bincount(places, weights, minlength=size)))


def _some(tilted: _Tilted, block: np.ndarray, size: int) -> np.ndarray:
    """The spectrum of the sum at some frequencies."""
    turns = (np.outer(tilted.places, block) % size) * (-2 * math.pi / size)
    real = tilted.probabilities @ np.cos(turns)
    imaginary = tilted.probabilities @ np.sin(turns)
    with np.errstate(divide="ignore"):
        logs = tilted.counts @ np.log(np.hypot(real, imaginary))
    angles = tilted.counts @ np.arctan2(imaginary, real)
    return np.exp(logs) * np.exp(1j * angles)


def _all(tilted: _Tilted, size: int) -> np.ndarray:
    """The spectrum of the sum at every frequency, powers by repeated squaring."""
    found = np.ones(size // 2 + 1, np.complex128)
    for kind, count in enumerate(tilted.counts):
        power, left = _transform(tilted, kind, size), int(count)
        while left:
            if left % 2:
                found *= power
            left //= 2
            power *= power
    return found


def _solve(tilted: _Tilted, masses: np.ndarray, start: int, delta: float) -> float:
    """The smallest epsilon at which delta suffices."""
    if delta <= 0:
        return math.inf
    losses = (start + np.arange(len(masses))) * tilted.unit
    # delta(e) = sum over losses l > e of (1 - exp(e - l)) exp(scale - tilt l) mass
    decay, both = math.exp(-tilted.tilt * tilted.unit), math.exp(-tilted.unit)
    plain = _discounted(masses, decay)
    lower = _discounted(masses, decay * both)
    logs = tilted.log_scale - tilted.tilt * losses
    with np.errstate(divide="ignore", over="ignore"):
        at = np.exp(np.minimum(logs + np.log(np.maximum(plain - lower, 0)), 1.0))
        at += np.exp(min(logs[-1] + _BEYOND, 1.0))
    enough = np.flatnonzero((at <= delta) & (losses >= 0))
    if not len(enough):
        return math.inf
    first = int(enough[0])
    if first == 0 or losses[first - 1] < 0 or at[first - 1] > 1:
        return float(max(losses[first], 0.0))
    # Between two places delta is a straight line over exp(epsilon).
    share = (at[first - 1] - delta) / (at[first - 1] - at[first])
    width = math.expm1(tilted.unit)
    return float(losses[first - 1] + math.log1p(share * width))


def _discounted(masses: np.ndarray, factor: float) -> np.ndarray:
    """Sums ``masses[j] factor^(j - i)`` over j > i, for every i."""
    from scipy import signal

    sums: Any = signal.lfilter([1.0], [1.0, -factor], masses[::-1])
    return sums[::-1] - masses
