"""The exact table behind every draw: a discrete law with probabilities of 96 bits.

A draw is ``X = 2^20 D + V1 + ... + V8 - centre``, an integer in units of 2^-27 standard
deviations. D comes from this table, with cells of 1/128 standard deviations; each V is
uniform on a lattice in one cell and smooths it. D's probabilities are a Gaussian's
density corrected by Hermite polynomials, so that D and the V's together have a
Gaussian's law up to what `dp_ilg.accounting.noise_law` bounds and charges.

All of it is integers and decimals of 60 digits, rounded correctly: the same table on
every machine.

Reference: Vose 1991 (alias tables); Strang and Fix 1973 (splines that reproduce);
docs/noise_law.md (the derivation).
"""

from __future__ import annotations

import decimal
import functools
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

CELLS_PER_STDDEV = 128  # cells of D in one standard deviation
CELL_BITS = 20  # a cell is 2^20 grid steps
GRID_BITS = 27  # a standard deviation is 2^27 grid steps
COLUMNS = 4096  # of the alias table, which takes 12 bits
REACH = 2020  # largest |D|: 15.8 standard deviations
SMOOTHING_BITS = (20, 20, 20, 14, 9, 6, 4, 2)  # of each V: a cell in so many steps
TABLE_BITS = 96  # of D's probabilities
_CENTRE = 127  # cells up to here pay for what the others are rounded up by
_LOG_SINC = (24, 2880, 181_440, 9_676_800, 479_001_600)  # of -log(sin(x/2)/(x/2))
_DIGITS = 60
_PI = "3.14159265358979323846264338327950288419716939937510582097494459230782"


class AliasTable(NamedTuple):
    """Columns of the alias method, three words each, uint32 ``[4096]``.

    Attributes:
        first: the alias in 12 bits, then the threshold's highest 20.
        second: its middle 32.
        third: its lowest 32.
    """

    first: np.ndarray
    second: np.ndarray
    third: np.ndarray


def steps_of_smoothing() -> list[int]:
    """The lattice of each V, in grid steps: ``2^20 / 2^bits``.

    Example:
        >>> steps_of_smoothing()
        [1, 1, 1, 64, 2048, 16384, 65536, 262144]
    """
    return [1 << (CELL_BITS - bits) for bits in SMOOTHING_BITS]


def centre() -> int:
    """What is subtracted, so that ``X + 1/2`` is symmetric.

    Example:
        >>> centre()
        4021215
    """
    twice = sum((1 << CELL_BITS) - step for step in steps_of_smoothing())
    return (twice + 1) // 2


@functools.cache
def weights() -> tuple[int, ...]:
    """Probabilities of D = -2020..2020, in units of 2^-96; they sum to 2^96.

    Rounded up everywhere but in the middle, where what that costs is taken: no value
    is less likely than it should be by more than 2^-82 of its probability.

    Returns:
        4,041 integers, symmetric.

    Example:
        >>> len(weights()), sum(weights()) == 1 << 96
        (4041, True)
    """
    with decimal.localcontext() as context:
        context.prec = _DIGITS
        unit = decimal.Decimal(2) ** TABLE_BITS
        half = [int(density * unit) + 1 for density in _densities()]
    values = half[:0:-1] + half
    surplus = sum(values) - (1 << TABLE_BITS)
    each, rest = divmod(surplus, 2 * _CENTRE + 1)
    for d in range(-_CENTRE, _CENTRE + 1):
        values[REACH + d] -= each
    values[REACH] -= rest
    return tuple(values)


def _densities() -> list[decimal.Decimal]:
    """D's probabilities at 0..2020, to 50 digits: Gaussian times its correction."""
    cell = 1 / decimal.Decimal(CELLS_PER_STDDEV)  # exact: 128 is a power of two
    factor = (-cell * cell / 2).exp()
    value = cell / (2 * decimal.Decimal(_PI)).sqrt()
    ratio, square = factor, factor * factor
    correction, found = [_decimal(c) for c in _correction()], []
    for d in range(REACH + 1):
        found.append(value * _corrected(d * cell, correction))
        value, ratio = value * ratio, ratio * square  # exp(-z^2 / 2) at the next z
    return found


def _corrected(z: decimal.Decimal, correction: list[decimal.Decimal]) -> Any:
    """The sum of Hermite polynomials of even degree with these coefficients."""
    below, value, found = decimal.Decimal(1), z, correction[0]
    for n in range(1, 2 * len(_LOG_SINC)):
        below, value = value, z * value - n * below
        if n % 2:
            found += correction[(n + 1) // 2] * value
    return found


def _correction() -> tuple[Fraction, ...]:
    """Coefficients of He_0, He_2, ... He_10: one over the smoothing's transform.

    That of a V over a cell w with step s is ``sinc(w/2) / sinc(s/2)``, and a Gaussian
    rounded to the grid h has ``sinc(h/2)`` beside its own.
    """
    lengths = [Fraction(step, 1 << GRID_BITS) for step in steps_of_smoothing()]
    lengths.append(Fraction(1, 1 << GRID_BITS))
    cell = Fraction(1, CELLS_PER_STDDEV)
    logs = [Fraction(0)]
    for j, divisor in enumerate(_LOG_SINC, 1):
        power = len(SMOOTHING_BITS) * cell ** (2 * j) - sum(
            s ** (2 * j) for s in lengths
        )
        logs.append(power / divisor)
    series = [Fraction(1)]
    for n in range(1, len(logs)):  # the exponential of a power series
        terms = (k * logs[k] * series[n - k] for k in range(1, n + 1))
        series.append(sum(terms, Fraction(0)) / n)
    return tuple(value * (-1) ** j for j, value in enumerate(series))


def _decimal(value: Fraction) -> decimal.Decimal:
    return decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator)


@functools.cache
def alias_table() -> AliasTable:
    """The table that 12 bits of a draw look up and 84 are compared with.

    Returns:
        Three read-only arrays.

    Example:
        >>> [x.shape for x in alias_table()]
        [(4096,), (4096,), (4096,)]
    """
    own, alias = _columns()
    words = [
        [a << 20 | t >> 64, t >> 32 & 0xFFFFFFFF, t & 0xFFFFFFFF]
        for t, a in zip(own, alias, strict=True)
    ]
    arrays = [np.array(column, np.uint32) for column in zip(*words, strict=True)]
    for array in arrays:
        array.flags.writeable = False
    return AliasTable(*arrays)


def _columns() -> tuple[list[int], list[int]]:
    """Vose's method on integers: each column's own share and whose the rest is."""
    full = (1 << TABLE_BITS) // COLUMNS
    left = [0] * COLUMNS
    low = COLUMNS // 2 - REACH
    left[low : low + 2 * REACH + 1] = weights()
    own, alias = [0] * COLUMNS, list(range(COLUMNS))
    small = [i for i, x in enumerate(left) if x < full]
    large = [i for i, x in enumerate(left) if x >= full]
    while small:
        i, j = small.pop(), large[-1]
        own[i], alias[i] = left[i], j
        left[j] -= full - left[i]
        if left[j] < full:
            small.append(large.pop())
    return own, alias  # a full column is its own alias
