"""Noise whose entries are not independent, as a matrix map makes it.

An example is then as far as ``sqrt(m^T S^-1 m)`` in standard deviations, with S the
covariance of the noise: entry by entry the distance would come out too large or too
small.
"""

from __future__ import annotations

import numpy as np

_LOOKED_AT = 64  # entries of a part whose correlations are tested
_LEVEL = 1e-9  # of that test
_KEYS_EACH = 4  # trials an entry, at least, for a covariance


def is_mixed(draws: np.ndarray) -> bool:
    """Whether entries of a part's noise are correlated.

    Args:
        draws: ``[keys, entries]``.

    Returns:
        What a chi-square test of all pairs among some entries says.

    Example:
        >>> alone = np.random.default_rng(0).normal(size=(500, 3))
        >>> turn = np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
        >>> is_mixed(alone), is_mixed(alone @ turn)
        (False, True)
    """
    from scipy import stats

    some = draws[:, :: max(1, draws.shape[1] // _LOOKED_AT)][:, :_LOOKED_AT]
    some = some[:, some.std(0) > 0]
    if some.shape[1] < 2:
        return False
    found = np.corrcoef(some, rowvar=False)[np.triu_indices(some.shape[1], 1)]
    most = stats.chi2.isf(_LEVEL, found.size)
    return bool(len(draws) * np.sum(found**2) > most)


def is_readable(draws: np.ndarray, entries: int) -> bool:
    """Whether there are enough keys for the covariance of so many entries."""
    return entries <= draws.shape[1] and _KEYS_EACH * entries <= len(draws)


def solved(draws: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """``S^-1 m`` from draws of the noise, unbiased.

    Args:
        draws: ``[keys, entries]``.
        moved: m, in any shape of so many entries.

    Returns:
        In the shape of `moved`; 0 where nothing is drawn, infinite where an entry moves
        without noise.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4000, 2)) * [1.0, 2.0]
        >>> solved(draws, np.array([1.0, 4.0])).round().tolist()
        [1.0, 1.0]
    """
    flat = moved.reshape(-1)
    noisy = draws.std(0) > 0
    keys = len(draws) - 1
    covariance = np.atleast_2d(np.cov(draws[:, noisy], rowvar=False))
    out = np.where(flat == 0, 0.0, np.inf)
    if noisy.any():
        share = (keys - noisy.sum() - 1) / keys
        out[noisy] = share * np.linalg.solve(covariance, flat[noisy])
    return out.reshape(moved.shape)
