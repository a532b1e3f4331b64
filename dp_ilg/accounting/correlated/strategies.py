"""Banded Toeplitz strategies: how the noise of one step takes back that of the last.

With coefficients c_0 = 1, c_1, ..., c_(b-1) the noise m_t of step t solves
``m_t + c_1 m_(t-1) + ... = z_t`` with fresh z_t: noise of neighbouring steps cancels in
their sum, which is where the parameters end up. An example moves b of the z, by
``|c|`` in all, so that z is ``|c|`` times as long as noise without correlation.
Coefficients are multiples of 2^-11: then the noise is made of whole numbers, exactly.

Reference: Choquette-Choo et al., (Amplified) Banded Matrix Factorization, NeurIPS 2023.
McKenna, Scaling up the Banded Matrix Factorization Mechanism, ICLR 2025 (Toeplitz).
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import numpy as np

UNIT = 2048  # coefficients are whole multiples of its inverse
MOST_BANDS = 32
MOST_SUM = 16.0  # of the coefficients, so that products fit 32 bits
MOST_GROWTH = 3.0  # of the noise of one step over a fresh draw, standard deviations


def check(strategy: Any) -> None:
    """Raises unless the coefficients make a strategy.

    Args:
        strategy: the coefficients, or () for noise without correlation.

    Raises:
        ValueError: for anything but a tuple of 2 to 32 multiples of 2^-11 from 0 to 1
            that starts with 1, whose sum is at most 16 and whose noise stays small.

    Example:
        >>> check((1.0, 0.5))
        >>> check((1.0, 0.3))
        Traceback (most recent call last):
        ValueError: strategy has the coefficient 0.3, but must have multiples ...
    """
    if strategy == () or strategy == []:
        return
    if not isinstance(strategy, tuple | list):
        raise ValueError(
            f"strategy is {strategy!r}, but must be a tuple of coefficients from "
            "dp_ilg.accounting.correlated.strategies.optimal, or ()."
        )
    if not 2 <= len(strategy) <= MOST_BANDS:
        raise ValueError(
            f"strategy has {len(strategy)} coefficients, but must have 2 to "
            f"{MOST_BANDS}, or none for noise without correlation."
        )
    for value in strategy:
        _check_coefficient(value)
    if strategy[0] != 1:
        raise ValueError(
            f"strategy starts with {strategy[0]:g}, but must start with 1; divide all "
            "coefficients by the first."
        )
    if sum(strategy) > MOST_SUM or growth(tuple(strategy)) > MOST_GROWTH:
        raise ValueError(
            f"strategy has the sum {sum(strategy):.3g} and lets noise grow to "
            f"{growth(tuple(strategy)):.3g} times a draw, but at most {MOST_SUM:g} and "
            f"{MOST_GROWTH:g} are possible; use coefficients that fall faster."
        )


def _check_coefficient(value: Any) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 <= float(value) <= 1 or float(value) * UNIT % 1:
        raise ValueError(
            f"strategy has the coefficient {value!r}, but must have multiples of "
            "1 / 2048 from 0 to 1; round them with "
            "dp_ilg.accounting.correlated.strategies.rounded."
        )


def rounded(coefficients: Any) -> tuple[float, ...]:
    """The nearest coefficients that a plan takes.

    Args:
        coefficients: numbers from 0 to 1, the first of them 1: a strategy of
            ``jax_privacy.matrix_factorization.toeplitz``, say.

    Returns:
        Multiples of 2^-11, as many.

    Example:
        >>> rounded([1.0, 0.5001, 0.375])
        (1.0, 0.5, 0.375)
    """
    values = np.asarray(coefficients, np.float64)
    return tuple(float(x) for x in np.rint(values * UNIT) / UNIT)


def length(strategy: tuple[float, ...]) -> float:
    """|c|: how much longer the fresh noise is; 1 without correlation.

    Example:
        >>> length((1.0, 0.75)), length(())
        (1.25, 1.0)
    """
    return math.sqrt(sum(c * c for c in strategy)) if strategy else 1.0


@functools.lru_cache(maxsize=64)
def growth(strategy: tuple[float, ...]) -> float:
    """How many times as long as a fresh draw the noise of one step becomes.

    Returns:
        The root of the sum of d_i^2 over 20,000 steps, d the inverse of the strategy:
        a ratio of standard deviations, infinite where it never settles.

    Example:
        >>> round(growth((1.0, 0.5)) ** 2, 6)
        1.333333
    """
    found = float(growths(strategy, 20_000)[-1])
    return found if math.isfinite(found) else math.inf


def growths(strategy: tuple[float, ...], num_steps: int) -> np.ndarray:
    """The same for each of the first steps: nothing has piled up at the first.

    Args:
        strategy: the coefficients; () for independent noise.
        num_steps: T.

    Returns:
        float64[T].

    Example:
        >>> growths((1.0, 0.5), 3).round(3).tolist()
        [1.0, 1.118, 1.146]
    """
    inverse = _response(strategy or (1.0,), np.eye(1, num_steps)[0])
    with np.errstate(all="ignore"):
        return np.sqrt(np.cumsum(inverse**2))


def prefix_error(strategy: tuple[float, ...], num_steps: int) -> float:
    """The noise of the sums of the first steps, relative to that of one fresh draw.

    Args:
        strategy: the coefficients; () for noise without correlation.
        num_steps: T.

    Returns:
        The root mean square over t of the standard deviation of m_1 + ... + m_t, times
        |c|: multiply by the noise multiplier.

    Example:
        >>> round(prefix_error((), 3), 6) == round(2**0.5, 6)
        True
        >>> prefix_error((1.0, 0.5), 100) < prefix_error((), 100)
        True
    """
    c = np.asarray(strategy or (1.0,))
    return math.sqrt(_mean_square(c, num_steps)[0]) * length(strategy)


@functools.lru_cache(maxsize=64)
def optimal(bands: Any, num_steps: int) -> tuple[float, ...]:
    """The strategy whose prefix sums have the least noise.

    Args:
        bands: b, 1 to 32; 1 is noise without correlation.
        num_steps: T, the steps of the run.

    Returns:
        The coefficients, multiples of 2^-11; () for one band. Where the noise of one
        step would be more than three times as long as a fresh draw (few bands in a
        very long run), coefficients that fall faster.

    Raises:
        ValueError: for another number of bands.

    Example:
        >>> optimal(1, 100)
        ()
        >>> [round(c, 2) for c in optimal(3, 100)]
        [1.0, 0.74, 0.62]

    Reference: McKenna 2025, section 3; the loss is that of
    ``jax_privacy.matrix_factorization.toeplitz``.
    """
    if isinstance(bands, bool) or not isinstance(bands, int | np.integer):
        raise ValueError(f"bands is {bands!r}, but must be a whole number or 'auto'.")
    if not 1 <= bands <= MOST_BANDS:
        raise ValueError(f"bands is {bands}, but must be from 1 to {MOST_BANDS}.")
    bands = min(int(bands), num_steps)
    if bands == 1:
        return ()
    from scipy import optimize

    start = np.cumprod([1 - 0.5 / i for i in range(1, bands)])
    found = optimize.minimize(
        _loss, start, (num_steps,), "L-BFGS-B", jac=True, bounds=[(0, 1)] * (bands - 1)
    )
    return _settled(np.array([1.0, *found.x]))


def _settled(c: np.ndarray) -> tuple[float, ...]:
    """The coefficients times powers of the largest ratio that keeps noise small."""
    for ratio in np.linspace(1.0, 0.5, 501):
        strategy = rounded(c * ratio ** np.arange(len(c)))
        if growth(strategy) <= MOST_GROWTH and sum(strategy) <= MOST_SUM:
            return strategy
    raise AssertionError("a geometric decay of 1/2 settles any strategy")


def _loss(tail: np.ndarray, num_steps: int) -> tuple[float, np.ndarray]:
    """Logarithm of the squared error, and its gradient; no number beyond 1e300."""
    c = np.concatenate([[1.0], tail])
    with np.errstate(all="ignore"):
        error, slope = _mean_square(c, num_steps)
        square = float(c @ c)
        rise = (slope / error + 2 * c / square)[1:]
    if not np.isfinite(error + rise.sum()):
        return 700.0, np.zeros(len(tail))
    return math.log(error * square), rise


def _mean_square(c: np.ndarray, num_steps: int) -> tuple[float, np.ndarray]:
    """Mean over t of the variance of m_1 + ... + m_t, and its gradient in c."""
    sums = _response(c, np.ones(num_steps))
    weights = (num_steps - np.arange(num_steps)) / num_steps
    delayed = _response(c, sums)  # minus the derivative in c_i is this, i steps later
    weighted = 2 * weights * sums
    slope = [-(weighted[i:] @ delayed[: num_steps - i]) for i in range(len(c))]
    return float(weights @ sums**2), np.array(slope)


def _response(c: Any, signal: np.ndarray) -> np.ndarray:
    from scipy import signal as filters

    with np.errstate(all="ignore"):
        found: Any = filters.lfilter([1.0], np.asarray(c, np.float64), signal)
    return found
