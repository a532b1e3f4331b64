"""Centred, shorter, evenly scaled inputs from three small private releases.

Maps such as those of a convolution or of scattering have two axes, channels and
positions, and their second moments nearly factor into one matrix for each. Both
matrices are tiny beside the full one, so noise that hides every example leaves their
strong directions standing where DP-PCA of the flat features would drown. Together with
the mean they cost three Gaussians, and the training that follows spends its clip norm
on what tells examples apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg import validation
from dp_ilg.projection.pca import with_noise, with_symmetric_noise

NAMES = ("mean", "channel moments", "position moments")
_SLACK = 1e-5  # relative margin under norm 1 that float32 sums cannot use up
_CHUNK_BYTES = 1 << 26
_WEAKEST = 1e-3  # of the strongest eigenvalue: none is taken to be weaker


class FactorPca(NamedTuple):
    """A public affine map of maps to short vectors, and what it cost.

    Attributes:
        mean: of the rows scaled to norm 1, float32 ``[channels, positions]``.
        channels: orthonormal rows, strongest first, float32 ``[kept, channels]``.
        positions: the same over positions, float32 ``[kept, positions]``.
        scales: factor of each coordinate, float32 ``[kept channels, kept positions]``.
        noise_multiplier: of each of the three releases.

    Privacy:
        All of it is public: post-processing of three Gaussian releases that have to be
        charged. What `project` returns is as private as what it was given.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 3, 4))
        >>> pca = private_factor_pca(x, 2, 3, noise_multiplier=0.1,
        ...     key=jax.random.key(0))
        >>> pca.num_features, pca.project(x[:5]).shape
        (6, (5, 6))
        >>> pca.releases[0]
        ('mean', 0.1)
    """

    mean: Any
    channels: Any
    positions: Any
    scales: Any
    noise_multiplier: float

    @property
    def num_features(self) -> int:
        """How many coordinates `project` gives."""
        return self.scales.size

    @property
    def releases(self) -> tuple[tuple[str, float], ...]:
        """What to give `dp_ilg.plan_privacy` as ``prior_releases=``."""
        return factor_releases(self.noise_multiplier)

    def project(self, x: Any) -> np.ndarray:
        """Coordinates of some rows: scaled to norm 1, centred, turned and scaled.

        Args:
            x: ``[rows, channels, positions]`` or ``[rows, channels * positions]``.

        Returns:
            float32 ``[rows, kept channels * kept positions]``; row i is a function of
            row i alone. A row that is not finite gives NaN, so that it stays absent
            from whatever clips it.

        Example:
            >>> one = np.ones((1, 1), np.float32)
            >>> pca = FactorPca(np.zeros((1, 2)), one, np.eye(2), np.ones((1, 2)), 1.0)
            >>> pca.project([[3.0, 4.0]]).round(3)
            array([[0.6, 0.8]], dtype=float32)
        """
        shape = np.shape(self.mean)
        across = np.asarray(self.channels, np.float32)
        along = np.asarray(self.positions, np.float32).T
        found = np.empty((len(x), self.scales.size), np.float32)
        first = 0
        for rows in _unit_chunks(x, shape):
            turned = across @ ((rows - self.mean) @ along) * self.scales
            here = np.asarray(x[first : first + len(rows)], np.float32)
            finite = np.isfinite(here.reshape(len(rows), -1)).all(1, keepdims=True)
            turned = np.where(finite, turned.reshape(len(rows), -1), np.nan)
            found[first : first + len(rows)] = turned
            first += len(rows)
        return found


def factor_releases(noise_multiplier: float) -> tuple[tuple[str, float], ...]:
    """What a `private_factor_pca` adds to a plan, before it is computed.

    Args:
        noise_multiplier: as for `private_factor_pca`.

    Returns:
        Three prior releases for `dp_ilg.plan_privacy`.

    Example:
        >>> factor_releases(30.0)[1]
        ('channel moments', 30.0)
    """
    return tuple((name, float(noise_multiplier)) for name in NAMES)


def private_factor_pca(
    x: Any,
    num_channels: int,
    num_positions: int,
    *,
    noise_multiplier: float,
    key: Any,
    whitening: float = 0.2,
) -> FactorPca:
    """Releases mean and second moments of maps, and makes a projection of them.

    Every row is scaled to norm 1. Released are (1) their sum, (2) and (3), of the rows
    minus that mean, clipped to norm 1, the sums of ``m @ m.T`` and ``m.T @ m``. The
    projection keeps the strongest eigenvectors of (2) and (3) and divides coordinate
    (i, j) by ``(v_i * v_j) ** whitening``, v being the eigenvalues as shares of the
    largest, at least 0.001; a common factor makes the mean square of a coordinate
    about 1.

    Args:
        x: one example a row, ``[examples, channels, positions]``, of any float type; a
            mapped file is read in pieces. A row that is not finite, or all zero, is
            absent.
        num_channels: how many directions over channels are kept; public.
        num_positions: how many over positions.
        noise_multiplier: of each release, relative to its sensitivity 1, above 0.
        key: PRNG key, secret, used for nothing else.
        whitening: 0 keeps the data's variances, 0.5 makes them all equal.

    Returns:
        The `FactorPca`. Give its `releases` to `dp_ilg.plan_privacy`.

    Raises:
        ValueError: for data of another shape, more directions than there are, noise
            that is not positive, or whitening outside [0, 0.5].
        TypeError: for anything that is not one key.

    Privacy:
        Three Gaussian mechanisms without sampling, one after the other. Adding or
        removing one example moves (1) by at most 1, and (2) and (3) by at most 1 in
        the Frobenius norm, because the norm of ``m @ m.T`` is at most that of m
        squared; the noise of the symmetric matrices is isotropic in their own
        coordinates. ``replace_one`` charges twice that. The number of examples is
        public. Sums and noise meet on a public grid (`dp_ilg.noise.release`).

    Example:
        >>> x = np.random.default_rng(0).normal(size=(3000, 4, 5)) + 2.0
        >>> x[:, 3] *= 0.01
        >>> pca = private_factor_pca(x, 3, 5, noise_multiplier=2.0,
        ...     key=jax.random.key(0))
        >>> z = pca.project(x)
        >>> z.shape, bool(abs(z.mean()) < 0.05), bool(0.8 < np.mean(z**2) < 1.2)
        ((3000, 15), True, True)

    Reference: Dwork et al. 2014 ("Analyze Gauss"), Algorithm 1, for each factor.
    """
    validation.positive("noise_multiplier", noise_multiplier)
    key = validation.key("key", key)
    _check(np.shape(x), num_channels, num_positions, whitening)
    count, shape, sigma = len(x), np.shape(x)[1:], float(noise_multiplier)
    keys = [jax.random.fold_in(key, use) for use in range(3)]
    total = sum(rows.sum(0, dtype=np.float64) for rows in _unit_chunks(x, shape))
    mean = (with_noise(np.asarray(total), sigma, keys[0]) / count).astype(np.float32)
    sums = [np.zeros((size, size)) for size in shape]
    for rows in _unit_chunks(x, shape):
        for which, part in enumerate(_moments(rows, mean)):
            sums[which] += part
    kept = (num_channels, num_positions)
    found = [
        _directions(with_symmetric_noise(moment, sigma, own), number, whitening)
        for moment, own, number in zip(sums, keys[1:], kept, strict=True)
    ]
    scales = np.outer(found[0].factors, found[1].factors)
    common = np.sqrt(_mean_square(found, _mean_trace(found) / count))
    return FactorPca(
        mean,
        found[0].vectors,
        found[1].vectors,
        (scales / common).astype(np.float32),
        sigma,
    )


class _Directions(NamedTuple):
    """The strongest eigenvectors of a released matrix."""

    vectors: np.ndarray
    values: np.ndarray
    factors: np.ndarray
    trace: float


def _mean_trace(found: list[_Directions]) -> float:
    """The total variance as both matrices tell it, which noise blurs differently."""
    return max(float(np.mean([one.trace for one in found])), 1.0)


def _mean_square(found: list[_Directions], trace: float) -> float:
    """Of a scaled coordinate, if the second moments factored exactly."""
    shares = [np.mean(one.values * one.factors**2) / one.trace for one in found]
    return max(float(trace * shares[0] * shares[1]), 1e-12)


def _directions(moment: np.ndarray, number: int, whitening: float) -> _Directions:
    values, vectors = np.linalg.eigh(moment)
    strongest = slice(None, -number - 1, -1)
    largest = max(float(values[-1]), 1.0)
    kept = np.maximum(values[strongest], _WEAKEST * largest)
    trace = max(float(np.trace(moment)), float(np.sum(kept)))
    factors = (kept / largest) ** -whitening
    return _Directions(vectors.T[strongest].astype(np.float32), kept, factors, trace)


def _moments(rows: np.ndarray, mean: np.ndarray) -> Iterator[np.ndarray]:
    """Both sums of outer products of some rows, centred and clipped to norm 1."""
    present = rows.any(axis=(1, 2), keepdims=True)
    rows = np.where(present, rows - mean, np.float32(0))
    norms = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)[:, None, None]
    rows = rows * ((1 - _SLACK) / np.maximum(norms, 1)).astype(np.float32)
    for view in (rows, rows.swapaxes(1, 2)):
        flat = np.asarray(view.swapaxes(0, 1), np.float64, order="C")
        flat = flat.reshape(view.shape[1], -1)
        yield flat @ flat.T  # in float64, or one example moved the rounding of all


def _unit_chunks(x: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Some rows at a time, float32 and of norm 1; what is not finite becomes zero."""
    size = max(1, _CHUNK_BYTES // (4 * int(np.prod(shape))))
    for first in range(0, len(x), size):
        rows = np.asarray(x[first : first + size], np.float32)
        rows = rows.reshape(len(rows), -1)
        rows = np.where(np.isfinite(rows).all(1, keepdims=True), rows, np.float32(0))
        largest = np.abs(rows).max(1, keepdims=True)
        rows = rows / np.where(largest > 0, largest, 1)  # squares do not overflow
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows * ((1 - _SLACK) / np.where(norms > 0, norms, 1))
        yield rows.astype(np.float32).reshape(len(rows), *shape)


def _check(
    shape: tuple[int, ...], num_channels: Any, num_positions: Any, whitening: Any
) -> None:
    if len(shape) != 3 or not all(shape):
        raise ValueError(
            f"The data has shape {shape}, but must be [examples, channels, positions]; "
            "reshape it so."
        )
    names = ("num_channels", "num_positions")
    for name, number, most in zip(
        names, (num_channels, num_positions), shape[1:], strict=True
    ):
        validation.whole(name, number)
        if number > most:
            raise ValueError(
                f"{name} is {number}, but the data has {most}; choose at most {most}."
            )
    if not 0 <= whitening <= 0.5:
        raise ValueError(f"whitening is {whitening}, but must lie in [0, 0.5].")
