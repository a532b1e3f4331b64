"""Principal directions of private data, from a noised second-moment matrix.

Each example is scaled to a norm of at most 1, so it moves the sum of outer products by
at most 1 in the Frobenius norm, and one Gaussian on the symmetric matrices pays for
whatever is computed from the result: directions, eigenvalues, how many to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.noise.normal import array_steps
from dp_ilg.noise.release import allowed_stddev, on_host

if TYPE_CHECKING:
    import dp_accounting

NAME = "DP-PCA"
_CHUNK_ROWS = 4096
_SLACK = 1e-5  # relative margin under norm 1 that float32 sums cannot use up


class PrivatePca(NamedTuple):
    """Public directions and what they cost.

    Attributes:
        components: orthonormal rows, strongest first, float32 ``[dims, features]``.
        eigenvalues: of the noised matrix divided by the public number of examples,
            float32 ``[dims]``; small ones may be all noise, or negative.
        noise_multiplier: the noise relative to one example's outer product.

    Privacy:
        All three are public: they come from one Gaussian release, which has to be
        charged. Projecting examples is not a release; the projections stay private.

    Example:
        >>> import jax
        >>> x = jnp.array([[3.0, 4.0], [6.0, 8.0]])
        >>> pca = private_pca(x, 1, noise_multiplier=0.01, key=jax.random.key(0))
        >>> np.abs(pca.components).round(1)
        array([[0.6, 0.8]], dtype=float32)
        >>> pca.releases
        (('DP-PCA', 0.01),)
    """

    components: Any
    eigenvalues: Any
    noise_multiplier: float

    @property
    def releases(self) -> tuple[tuple[str, float], ...]:
        """What to give `dp_ilg.plan_privacy` as ``prior_releases=``."""
        return pca_releases(self.noise_multiplier)

    def event(self) -> dp_accounting.DpEvent:
        """Returns the release as one Gaussian, for any accountant.

        Example:
            >>> PrivatePca(None, None, 4.0).event().noise_multiplier
            4.0
        """
        import dp_accounting  # slow to import, so only where it is needed

        return dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def project(self, x: Any) -> Array:
        """Coordinates of some rows, as they are, along the directions.

        Args:
            x: ``[rows, features]`` or ``[features]``.

        Returns:
            ``[rows, dims]`` or ``[dims]``, as private as `x` was.

        Example:
            >>> PrivatePca(jnp.eye(3)[:2], None, 1.0).project(jnp.arange(3.0)).tolist()
            [0.0, 1.0]
        """
        return jnp.asarray(x) @ jnp.asarray(self.components).T


def pca_releases(noise_multiplier: float) -> tuple[tuple[str, float], ...]:
    """What a DP-PCA with this noise adds to a plan, before it is computed.

    Args:
        noise_multiplier: as for `private_pca`.

    Returns:
        One prior release for `dp_ilg.plan_privacy`.

    Example:
        >>> pca_releases(16.0)
        (('DP-PCA', 16.0),)
    """
    return ((NAME, float(noise_multiplier)),)


def private_pca(
    x: Any, num_components: int, *, noise_multiplier: float, key: Any
) -> PrivatePca:
    """Finds the strongest directions of the rows, from a noised sum.

    Rows are scaled to norm 1 (zero rows stay), not centred: centring on the data's
    mean would be another release. Their outer products are summed and symmetric
    Gaussian noise of standard deviation `noise_multiplier` on the diagonal and
    ``noise_multiplier / sqrt(2)`` off it is added, which is the isotropic Gaussian on
    symmetric matrices under the Frobenius norm. The eigenvectors are post-processing.

    Args:
        x: one example a row, floating point ``[examples, features]``. A row that holds
            NaN or infinity is absent.
        num_components: how many directions, at most the number of features; public.
        noise_multiplier: noise relative to the sensitivity 1, above 0.
        key: PRNG key, secret, used for nothing else.

    Returns:
        The `PrivatePca`. Give its `releases` to `dp_ilg.plan_privacy`.

    Raises:
        ValueError: for data that is no matrix, more components than features, or noise
            that is not positive.
        TypeError: for anything that is not one key.

    Privacy:
        One Gaussian mechanism without sampling: adding or removing one example moves
        the sum by at most 1 in the Frobenius norm, so by at most 1 in the coordinates
        (diagonal, sqrt(2) times the rest), in which the noise is isotropic. Replacing
        one moves it by at most 2 (sqrt(2), in fact), which ``replace_one`` charges. The
        number of examples is taken as public. Sum and noise
        meet on a public grid (`dp_ilg.noise.release`).

    Example:
        >>> import jax
        >>> x = np.random.default_rng(0).normal(size=(5000, 4)) * [5, 3, 0.1, 0.1]
        >>> pca = private_pca(x, 2, noise_multiplier=8.0, key=jax.random.key(0))
        >>> pca.components.shape, pca.project(x).shape
        ((2, 4), (5000, 2))
        >>> private_pca(x, 5, noise_multiplier=8.0, key=jax.random.key(0))
        Traceback (most recent call last):
        ValueError: num_components is 5, but the data has 4 features; choose at most 4.

    Reference: Abadi et al. 2016, section 4; Dwork et al. 2014 ("Analyze Gauss"),
    Algorithm 1, whose noise is the same off the diagonal's factor.
    """
    validation.positive("noise_multiplier", noise_multiplier)
    key = validation.key("key", key)
    try:
        rows = jnp.asarray(x, jnp.float32)
    except OverflowError:
        raise ValueError("x holds a number that is too large; scale it.") from None
    _check(rows, num_components)
    noised = noised_second_moment(rows, float(noise_multiplier), key)
    values, vectors = np.linalg.eigh(noised)
    strongest = slice(None, -num_components - 1, -1)
    return PrivatePca(
        jnp.asarray(vectors.T[strongest], jnp.float32),
        jnp.asarray(values[strongest] / rows.shape[0], jnp.float32),
        float(noise_multiplier),
    )


def noised_second_moment(
    rows: Float[Array, "rows features"], noise_multiplier: Any, key: Array
) -> Float[np.ndarray, "features features"]:
    """The sum of outer products of rows scaled to norm 1, plus symmetric noise.

    Args:
        rows: the examples; one that is not finite is absent.
        noise_multiplier: the standard deviation on the diagonal.
        key: used for nothing else.

    Returns:
        A symmetric matrix in float64; this is the release.

    Privacy:
        See `private_pca`. It is no traced function: sums and noise meet in float64.

    Example:
        >>> import jax
        >>> x = jnp.array([[0.0, 9.0], [jnp.nan, 1.0]])
        >>> noised_second_moment(x, 0.0, jax.random.key(0)).round(3).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    finite = jnp.all(jnp.isfinite(rows), axis=1, keepdims=True)
    rows = jnp.where(finite, rows, 0)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)  # squares neither over- nor
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)  # underflow
    units = rows * ((1 - _SLACK) / jnp.where(norms > 0, norms, 1))
    total = _sum_of_outer_products(np.asarray(units))
    return with_symmetric_noise(total, float(noise_multiplier), key)


def with_noise(total: np.ndarray, noise_multiplier: float, key: Array) -> np.ndarray:
    """A float64 sum of sensitivity 1 plus noise, added on a public grid.

    Args:
        total: the sum.
        noise_multiplier: its noise's standard deviation; 0 adds none.
        key: used for nothing else.

    Returns:
        The release, float64.

    Raises:
        ValueError: for a multiplier too large for so many coordinates.

    Privacy: one Gaussian mechanism; see `dp_ilg.noise.release`.

    Example:
        >>> import jax
        >>> with_noise(np.ones(3), 0.0, jax.random.key(0)).tolist()
        [1.0, 1.0, 1.0]
    """
    if noise_multiplier == 0:
        return total
    steps = array_steps(key, total.shape)
    stddev = allowed_stddev(noise_multiplier, noise_multiplier, total.size)
    return on_host(total, stddev, np.asarray(steps))


def with_symmetric_noise(
    total: np.ndarray, noise_multiplier: float, key: Array
) -> np.ndarray:
    """A symmetric sum plus the isotropic Gaussian under the Frobenius norm.

    Coordinates are the diagonal and sqrt(2) times the entries above it; each of these
    gets its own noise, and the matrix is mirrored.

    Args:
        total: the sum, float64, of sensitivity 1 in the Frobenius norm.
        noise_multiplier: the standard deviation on the diagonal; 0 adds none.
        key: used for nothing else.

    Returns:
        The release, symmetric.

    Raises:
        ValueError: for a multiplier too large for so many coordinates.

    Privacy: one Gaussian mechanism; see `dp_ilg.noise.release`.

    Example:
        >>> import jax
        >>> noised = with_symmetric_noise(np.eye(3), 2.0, jax.random.key(0))
        >>> bool((noised == noised.T).all())
        True
    """
    upper = np.triu_indices(len(total))
    scale = np.where(upper[0] == upper[1], 1.0, np.sqrt(2))
    found = np.zeros_like(total)
    found[upper] = with_noise(total[upper] * scale, noise_multiplier, key) / scale
    found.T[upper] = found[upper]
    return found


def _sum_of_outer_products(units: np.ndarray) -> np.ndarray:
    """In float64, a few rows at a time: in float32 one row moves all the rounding."""
    total = np.zeros((units.shape[1],) * 2)
    for first in range(0, len(units), _CHUNK_ROWS):
        chunk = units[first : first + _CHUNK_ROWS].astype(np.float64)
        total += chunk.T @ chunk
    return (total + total.T) / 2


def _check(rows: Any, num_components: Any) -> None:
    if rows.ndim != 2 or not rows.shape[0]:
        raise ValueError(
            f"The data has shape {rows.shape}, but must have one example a row; "
            "flatten each with x.reshape(len(x), -1)."
        )
    validation.whole("num_components", num_components)
    features = rows.shape[1]
    if num_components > features:
        raise ValueError(
            f"num_components is {num_components}, but the data has {features} "
            f"features; choose at most {features}."
        )
