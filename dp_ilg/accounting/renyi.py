"""Renyi divergences of one step: a Poisson-sampled Gaussian at many orders.

Whole orders are binomial sums, the others an integral. dp_accounting computes the
same curve, but its series for the other orders takes seconds for a schedule of many
stages and does not converge where sampling rates are near 1/2; the tests hold the two
against each other.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np

_MOST_POINTS = 2**18


@functools.lru_cache(maxsize=4096)
def step_divergences(
    sampling_prob: float,
    noise_multiplier: float,
    orders: tuple[float, ...],
    sensitivity: int = 1,
) -> np.ndarray:
    """Computes the Renyi divergence of one step at each order.

    Args:
        sampling_prob: the Poisson rate, in (0, 1]; 1 is an unsampled Gaussian.
        noise_multiplier: relative to the norm bound of one example, above 0.
        orders: orders above 1.
        sensitivity: 1 if neighbours differ by an example added or removed, 2 if by one
            replaced.

    Returns:
        The divergences, read-only.

    Privacy:
        The divergence of the worst pair of neighbours: N(0, z^2) mixed with N(1, z^2),
        against N(0, z^2) for an example added or removed (Mironov, Talwar and Zhang
        2019), and against N(0, z^2) mixed with N(-1, z^2) for one replaced (Lebeda,
        Regehr, Kamath and Steinke 2024). dp_accounting's privacy loss distributions
        rest on the same pairs.

    Example:
        >>> step_divergences(1.0, 2.0, (2.0, 4.0))
        array([0.25, 0.5 ])
        >>> step_divergences(0.1, 2.0, (2.0, 4.0)).round(4)
        array([0.0028, 0.006 ])
    """
    q, z = sampling_prob, noise_multiplier
    unsampled = np.array(orders) * sensitivity**2 / (2 * z**2)
    if q < 1:
        moments = np.array([_moment(q, z, order, sensitivity) for order in orders])
        sampled = np.maximum(moments, 0) / (np.array(orders) - 1)
        unsampled = np.minimum(unsampled, sampled)  # sampling never costs
    unsampled.flags.writeable = False
    return unsampled


def run_divergences(
    kinds: Iterable[tuple[float, float, tuple[tuple[float, float], ...], int]],
    orders: tuple[float, ...],
    sensitivity: int,
) -> np.ndarray:
    """Adds up the divergences of the steps of a run.

    Args:
        kinds: `dp_ilg.accounting.kinds.Kind` of its steps.
        orders: orders above 1.
        sensitivity: as for `step_divergences`.

    Returns:
        The divergence at each order; steps that may be cut are charged as such.

    Example:
        >>> run_divergences([(1.0, 2.0, (), 3)], (2.0, 4.0), 1)
        array([0.75, 1.5 ])
    """
    totals = np.zeros((2, len(orders)))  # N - 1 others and N, see `truncation`
    for q, z, truncated, count in kinds:
        step = step_divergences(q, z, orders, sensitivity)
        for law, total in enumerate(totals):
            one = step
            if truncated and truncated[law][0]:
                cut, rate = truncated[law]
                worse = step_divergences(rate, z / 2, orders, sensitivity)
                one = mixture(step, worse, cut, orders)
            total += count * one
    return totals[0] if sensitivity == 2 else totals.max(axis=0)


def mixture(
    one: np.ndarray, other: np.ndarray, share: float, orders: tuple[float, ...]
) -> np.ndarray:
    """Divergences of a step that is one of two, by a coin whose result is told.

    Args:
        one: divergences of the first at each order.
        other: those of the second.
        share: the probability of the second, the same for both neighbours.
        orders: the orders, above 1.

    Returns:
        The divergences of the whole: exp((a - 1) D_a) is the mean of those of the two.

    Example:
        >>> mixture(np.array([1.0]), np.array([2.0]), 0.5, (2.0,)).round(2)
        array([1.62])
    """
    excess = np.array(orders) - 1
    first = excess * one + math.log1p(-share) if share < 1 else -np.inf
    whole = np.logaddexp(first, excess * other + math.log(share))
    return np.maximum(whole, 0.0) / excess  # rounding may leave it below 0


def _moment(q: float, z: float, order: float, sensitivity: int) -> float:
    """The log of E_Q[(P / Q)^order] of the worst pair P, Q of neighbours."""
    if sensitivity == 1 and order == int(order):
        return _binomial_moment(q, z, int(order))
    return _integral_moment(q, z, order, sensitivity)


def _binomial_moment(q: float, z: float, order: int) -> float:
    k = np.arange(order + 1.0)
    log_odds = k * math.log(q) + (order - k) * math.log1p(-q)
    return _log_sum(_log_binomials(order) + log_odds + k * (k - 1) / (2 * z**2))


def _integral_moment(q: float, z: float, order: float, sensitivity: int) -> float:
    """The trapezoid rule; its error is that of rounding.

    The integrand is analytic in a strip of half width pi z^2 and falls like a
    Gaussian of width z, so steps of z / 4 and z^2 / 2 are short enough. With so little
    noise that there would be millions of them, sampling hides nothing: infinite, and
    the unsampled bound counts.
    """
    step = min(z / 4, z**2 / 2)
    low, high = -12 * z, sensitivity * order + 12 * z
    if high - low > _MOST_POINTS * step:
        return math.inf
    x = np.arange(low, high, step)
    terms = -0.5 * (x / z) ** 2 + math.log(step / z) - 0.5 * math.log(2 * math.pi)
    terms += order * _log_mixture(q, (2 * x - 1) / (2 * z**2))
    if sensitivity == 2:
        terms += (1 - order) * _log_mixture(q, (-2 * x - 1) / (2 * z**2))
    return _log_sum(terms)


def _log_mixture(q: float, log_ratio: np.ndarray) -> np.ndarray:
    return np.logaddexp(math.log1p(-q), math.log(q) + log_ratio)


@functools.cache
def _log_binomials(n: int) -> np.ndarray:
    from scipy import special  # slow to import, so only where it is needed

    k = np.arange(n + 1.0)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _log_sum(terms: np.ndarray) -> float:
    top = terms.max()
    return float(top + math.log(np.exp(terms - top).sum()))
