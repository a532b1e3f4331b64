"""The exact law of a draw, point by point: integers from the table to the ratio."""

import decimal
import functools

import numpy as np

from dp_ilg.noise import table

STDDEV = 1 << table.GRID_BITS
CELL = 1 << table.CELL_BITS
CONTEXT = decimal.Context(prec=60)


@functools.cache
def coarse_counts() -> np.ndarray:
    """Ways in which V4 + ... + V8 is 64 k; the lattice of all five is 64 wide."""
    counts = np.ones(1, np.int64)
    for step in table.steps_of_smoothing()[3:]:
        places = (CELL - step) // 64
        spread = np.zeros(places + 1, np.int64)
        spread[:: step // 64] = 1
        total = np.zeros(len(counts) + places, np.int64)
        for place in np.flatnonzero(counts) if len(counts) < 100 else ():
            total[place : place + len(spread)] += counts[place] * spread
        if len(counts) >= 100:  # a sliding sum over the uniform's lattice
            comb = np.concatenate([counts, np.zeros(places, np.int64)])
            stride = step // 64
            for start in range(stride):
                column = np.cumsum(comb[start::stride])
                width = places // stride + 1
                column[width:] -= column[:-width].copy()
                total[start::stride] = column
        counts = total
    return counts


def triple_count(y: np.ndarray) -> np.ndarray:
    """Ways in which three uniform numbers of 20 bits sum to y; below 2^41."""
    found = np.zeros(y.shape, np.int64)
    for sign, shift in ((1, 0), (-3, CELL), (3, 2 * CELL), (-1, 3 * CELL)):
        left = np.maximum(y - shift + 1, 0)
        found += sign * (left * (left + 1) // 2)
    return np.where(y > 3 * CELL - 3, 0, found)


def smoothing_count(v: int) -> int:
    """Ways, of 2^95, in which V1 + ... + V8 is v."""
    counts = coarse_counts()
    low = max(0, -(-(v - 3 * CELL + 3) // 64))
    high = min(len(counts) - 1, v // 64)
    if high < low:
        return 0
    index = np.arange(low, high + 1)
    triple, own = triple_count(v - 64 * index), counts[low : high + 1]
    # products reach 2^75: split one factor so that sums stay below 2^63
    parts = [(own >> s) & 0xFFF for s in range(0, 36, 12)]
    halves = [(triple >> s) & 0xFFFFF for s in (0, 20, 40)]
    return sum(
        int(np.sum(p * t)) << (12 * i + 20 * j)
        for i, p in enumerate(parts)
        for j, t in enumerate(halves)
    )


def probability(x: int) -> decimal.Decimal:
    """The exact probability that a draw is x."""
    weights, found = table.weights(), 0
    first = (x + table.centre()) // CELL
    for d in range(first - 8, first + 1):
        if abs(d) <= table.REACH:
            ways = smoothing_count(x + table.centre() - d * CELL)
            found += weights[d + table.REACH] * ways
    bits = table.TABLE_BITS + sum(table.SMOOTHING_BITS)
    return CONTEXT.divide(decimal.Decimal(found), decimal.Decimal(1 << bits))


def rounded_gaussian(x: int) -> decimal.Decimal:
    """The probability of [x, x + 1) under a Gaussian of 2^27, to 40 digits."""
    c, h = CONTEXT, decimal.Decimal(1) / STDDEV
    z = c.multiply(decimal.Decimal(2 * x + 1) / 2, h)
    square, width = c.multiply(z, z), c.multiply(h, h)
    curve = 1 + (square - 1) * width / 24
    curve += (square * square - 6 * square + 3) * width * width / 1920
    density = c.exp(-square / 2) / c.sqrt(2 * decimal.Decimal(table._PI))
    return c.multiply(c.multiply(density, h), curve)


def relative_error(x: int) -> float:
    """(drawn - exact) / exact at x."""
    with decimal.localcontext(CONTEXT):
        return float(probability(x) / rounded_gaussian(x) - 1)
