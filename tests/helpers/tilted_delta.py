"""A second oracle for runs whose large losses are rare: a tilted convolution.

Each loss is split between the two neighbouring points of a fine grid so that its mean
stays, the masses are tilted and convolved, and single losses far above epsilon are
counted apart. Good to about a percent where the grid is fine against the spread; its
faults have nothing in common with those of a contour sum.
"""

import math

import numpy as np

_POINTS = 1 << 23
_CELLS = 4_000_001
_REACH = 1.2  # times epsilon: larger losses are single jumps
_AGREE = 0.01


def _losses(q, z, sensitivity, removed):
    """Losses on a fine grid of outcomes and the probabilities of the first side."""
    x = np.linspace(-14 * z - 2, 14 * z + 2, _CELLS)
    usual = np.exp(-x * x / (2 * z * z)) / math.sqrt(2 * math.pi) / z * (x[1] - x[0])
    up = np.expm1((2 * x - 1) / (2 * z * z))
    if sensitivity == 2:
        down = np.expm1((-2 * x - 1) / (2 * z * z))
        return np.log1p(q * up) - np.log1p(q * down), usual * (1 + q * up)
    with np.errstate(divide="ignore"):
        loss = np.log1p(q * up)
    return (loss, usual * (1 + q * up)) if removed else (-loss, usual)


def tilted_delta(steps, sensitivity, removed, epsilon):
    """Delta at an epsilon, or None where two tilts disagree.

    Args:
        steps: ([(weight, rate, noise multiplier), ...], count) of each kind.
        sensitivity: 1, or 2 for a replaced example.
        removed: whether the first side has the example.
        epsilon: above 0.

    Returns:
        The delta, right to about a percent.
    """
    rows, extra = _rows(steps, sensitivity, removed, epsilon)
    found = [_at(rows, epsilon, c / epsilon) for c in (8, 16, 24, 30)]
    found = [x for x in found if x is not None]
    for one, other in zip(found[::-1], found[-2::-1], strict=False):
        if abs(one - other) <= _AGREE * one:
            return one + extra
    return None


def _rows(steps, sensitivity, removed, epsilon):
    most, extra, rows = _REACH * epsilon, 0.0, []
    unit = 2 * (most + epsilon) / _POINTS
    for parts, count in steps:
        row = np.zeros(_POINTS)
        for weight, q, z in parts:
            loss, mass = _losses(q, z, sensitivity, removed)
            far = loss > most
            extra += count * weight * float(mass[far] @ -np.expm1(epsilon - loss[far]))
            near = ~far & (loss > -most)
            place = loss[near] / unit
            low = np.floor(place).astype(np.int64)
            share = place - low
            own = weight * mass[near]
            row += np.bincount(low % _POINTS, own * (1 - share), _POINTS)
            row += np.bincount((low + 1) % _POINTS, own * share, _POINTS)
        rows.append((row, count))
    return rows, extra


def _at(rows, epsilon, tilt):
    unit = 2 * (_REACH + 1) * epsilon / _POINTS
    number = np.arange(_POINTS)
    sums = np.where(number >= _POINTS // 2, number - _POINTS, number) * unit
    scale, product = 0.0, 0.0
    for row, count in rows:
        tilted = row * np.exp(tilt * sums)
        total = float(tilted.sum())
        scale += count * math.log(total)
        with np.errstate(divide="ignore"):
            product = product + count * np.log(np.fft.rfft(tilted / total))
    if scale > 600:
        return None
    found = np.fft.irfft(np.exp(product), _POINTS)
    over = np.maximum(sums - epsilon, 0)
    value = float(found @ (np.exp(-tilt * over) * -np.expm1(-over)))
    if value < 1e-11:  # below the round-off of the transform
        return None
    return math.exp(math.log(value) + scale - tilt * epsilon)
