"""A lower bound on delta from the privacy losses of a run: a check of an accountant.

An accountant claims that a run is (epsilon, delta)-DP. Here every loss is rounded down
where an accountant rounds up, what lies far out is dropped where an accountant counts
it as lost, and what rounding could add is taken off. Nothing is shared with an
accountant. The losses are tilted before they are convolved, so that a delta of 1e-30 is
as exact as one of 1e-5.
"""

import math
from collections.abc import Iterable

import numpy as np

from dp_ilg import validation

_CELLS = 400_000
_POINTS = 1 << 21
_DEVIATIONS = 12.0
_REACH = 16.0  # standard deviations of the sum that the grid holds to either side
_ROUNDING = 1e-11  # far above the error of transforms of 2^21 numbers of sum 1,
_POWER = 1e-14  # and this above what a step adds to it
_LARGEST = 600.0  # exponent that float64 holds
_Law = tuple[np.ndarray, np.ndarray, int]


def delta_lower_bound(
    steps: Iterable[tuple[float, float, int]], epsilon: float
) -> float:
    """A delta that a run of (Poisson-sampled) Gaussians has at least.

    Args:
        steps: sampling probability, noise multiplier and number of each kind of step.
        epsilon: the claim, at least 0.

    Returns:
        The bound; compare it with the delta of the claim: above that, the claim is
        refuted. It is sharp up to about 10,000 steps (within a percent at 1,000), and
        lower than need be for more.

    Raises:
        ValueError: for numbers out of range, or no step.

    Privacy: reads no data. One example is added or removed; the side of the pair that
        has it is the first one.

    Example:
        >>> from scipy.stats import norm
        >>> true = norm.sf(0.5) - math.e * norm.sf(1.5)  # one Gaussian, z = 1
        >>> found = delta_lower_bound([(1.0, 1.0, 1)], 1.0)
        >>> bool(0.999 * true < found < true)
        True

    Reference: Asmussen and Glynn 2007, chapter VI (exponential tilting).
    """
    kinds = [(float(q), float(z), int(count)) for q, z, count in steps]
    for q, z, count in kinds:
        if q != 1:
            validation.fraction("sampling_prob", q)
        validation.positive("noise_multiplier", z)
        validation.whole("count", count)
    if not kinds:
        raise ValueError("The run has no steps; give at least one.")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon!r}, but must be 0 or above and finite.")
    laws = [(*_cells(q, z), count) for q, z, count in kinds]
    tilt = _saddle(laws, epsilon)
    tilted, scale = _tilted(laws, tilt)
    return max(
        0.0, _expectation(tilted, epsilon, tilt) * math.exp(scale - tilt * epsilon)
    )


def _cells(q: float, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses at the lower ends of cells, and the log of the cells' probabilities.

    Losses beyond 12 standard deviations are dropped, which only lowers the answer.
    """
    from scipy import special

    ends = np.linspace(-_DEVIATIONS * z, 1 + _DEVIATIONS * z, _CELLS + 1)
    sampled = (2 * ends - 1) / (2 * z * z) + math.log(q)
    loss = sampled if q == 1 else np.logaddexp(math.log1p(-q), sampled)

    def log_mass(x: np.ndarray) -> np.ndarray:
        far = np.maximum(np.abs(x[:-1]), np.abs(x[1:]))
        near = np.minimum(np.abs(x[:-1]), np.abs(x[1:]))
        tail = special.log_ndtr(-near)
        with np.errstate(divide="ignore"):
            aside = tail + np.log(-np.expm1(special.log_ndtr(-far) - tail))
            across = np.log(special.ndtr(x[1:]) - special.ndtr(x[:-1]))
        return np.where(x[:-1] * x[1:] > 0, aside, across)

    without = log_mass(ends / z) + (math.log1p(-q) if q < 1 else -math.inf)
    return loss[:-1], np.logaddexp(without, log_mass((ends - 1) / z) + math.log(q))


def _cumulant(law: _Law, tilt: float) -> float:
    """The log of E exp(tilt loss), over the cells that are kept."""
    values = law[1] + tilt * law[0]
    top = float(np.max(values))
    return top + math.log(float(np.sum(np.exp(values - top))))


def _saddle(laws: list[_Law], epsilon: float) -> float:
    """The tilt under which the sum of all losses is about epsilon."""
    from scipy import optimize

    def exponent(tilt: float) -> float:
        return sum(law[2] * _cumulant(law, tilt) for law in laws) - tilt * epsilon

    high = 1.0
    while exponent(2 * high) < exponent(high) and high < 1e6:
        high *= 2
    found = optimize.minimize_scalar(exponent, bounds=(0, 2 * high), method="bounded")
    return float(found.x)


def _tilted(laws: list[_Law], tilt: float) -> tuple[list[_Law], float]:
    """The laws under the tilt, as probabilities, and the log of what they were."""
    own = [_cumulant(law, tilt) for law in laws]
    tilted = [
        (losses, np.exp(logs + tilt * losses - c), count)
        for (losses, logs, count), c in zip(laws, own, strict=True)
    ]
    return tilted, sum(count * c for (*_, count), c in zip(laws, own, strict=True))


def _expectation(tilted: list[_Law], epsilon: float, tilt: float) -> float:
    """E exp(-tilt (S - epsilon)) (1 - exp(epsilon - S))+, rounded down."""
    means = [float(p @ losses) for losses, p, _ in tilted]
    spreads = [
        float(p @ (losses - mean) ** 2)
        for (losses, p, _), mean in zip(tilted, means, strict=True)
    ]
    counts = [count for *_, count in tilted]
    mean = sum(c * m for c, m in zip(counts, means, strict=True))
    spread = math.sqrt(sum(c * v for c, v in zip(counts, spreads, strict=True)))
    single = max(float(np.max(losses) - np.min(losses)) for losses, *_ in tilted)
    half = _REACH * spread + single + abs(mean - epsilon)
    unit = 2 * half / _POINTS
    product: np.ndarray | complex = 1.0
    for losses, p, count in tilted:
        places = np.floor(losses / unit).astype(np.int64)
        row = np.bincount(places % _POINTS, p, _POINTS)
        product = product * np.fft.rfft(row) ** count
    found = np.fft.irfft(product, _POINTS)
    first = math.floor(epsilon / unit) - _POINTS // 2
    sums = (np.arange(_POINTS) + first) * unit
    over = np.maximum(sums - epsilon, 0)
    worth = np.exp(-tilt * over) * -np.expm1(-over)
    wrapped = _beyond(tilted, epsilon, half)
    value = float(worth @ found[(np.arange(_POINTS) + first) % _POINTS])
    return value - wrapped - _ROUNDING - _POWER * sum(counts)


def _beyond(tilted: list[_Law], epsilon: float, half: float) -> float:
    """A bound on the probability that the sum is off the grid, by Chernoff."""
    total = 0.0
    for sign in (1.0, -1.0):
        best = 0.0
        for rate in 2.0 ** np.arange(-20, 12):
            if max(rate * float(np.max(np.abs(x))) for x, *_ in tilted) > _LARGEST:
                break
            grown = sum(
                count * math.log(float(p @ np.exp(sign * rate * x)))
                for x, p, count in tilted
            )
            best = min(best, grown - rate * (half + sign * epsilon))
        total += math.exp(best)
    return total
