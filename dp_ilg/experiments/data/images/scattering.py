"""Wavelet scattering of images: public features that a linear model trains well on.

Two layers of a fixed convolutional network: Morlet wavelets of 2 scales and 8 angles,
the modulus, a Gaussian low-pass that keeps every fourth pixel. Nothing is learnt, so an
image's features depend on that image alone. Filters, borders and order of the channels
are those of Kymatio, with whose values the tests compare.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NUM_SCALES = 2
NUM_ANGLES = 8
NUM_COEFFICIENTS = 1 + NUM_SCALES * NUM_ANGLES + NUM_ANGLES**2
NUM_GROUPS = 27

_STEP = 2**NUM_SCALES  # one feature for so many pixels, also the border's width
_SIGMA = 0.8  # width in pixels of the finest wavelet
_FREQUENCY = 3 * np.pi / 4  # its centre, radians a pixel
_SLANT = 4 / NUM_ANGLES  # its width along the wave over that across
_PI = 3.1415  # Kymatio normalises by this; the exact one would differ by 3e-5
_VARIANCE_FLOOR = 1e-5
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]])  # grey, red-green, blueness
_OPPONENT = (_OPPONENT.T / np.linalg.norm(_OPPONENT, axis=1)).astype(np.float32)


class _Filters(NamedTuple):
    """Spectra of the wavelets of each scale, maps of U to its low-pass samples."""

    fine: np.ndarray  # [angles, side, side]
    coarse: np.ndarray  # [angles, side, side]
    low: tuple[np.ndarray, np.ndarray]  # from side and side / 2: [side^2, samples]


def scatter(
    images: Float[Array, "batch height width"],
) -> Float[Array, "batch coefficients rows columns"]:
    """Scattering coefficients of order 0, 1 and 2 of square grey images.

    Args:
        images: ``[batch, side, side]``; the side is a multiple of 4 from 8 on.

    Returns:
        ``[batch, 81, side/4, side/4]``: the low-passed image, 8 angles at the fine and
        8 at the coarse scale, then for each fine angle the 8 coarse of its modulus.

    Raises:
        ValueError: for images of another shape.

    Privacy:
        Row i is a function of image i and of constants: preprocessing that needs no
        budget, whichever relation of neighbours is meant.

    Example:
        >>> scatter(jnp.ones((2, 28, 28))).shape
        (2, 81, 7, 7)

    Reference:
        Bruna and Mallat, "Invariant Scattering Convolution Networks", PAMI 2013;
        Andreux et al., "Kymatio", JMLR 2020, for filters and borders.
    """
    _, height, width = images.shape
    if height != width or height < 2 * _STEP or height % _STEP:
        raise ValueError(
            f"Scattering takes square images whose side is a multiple of {_STEP} and "
            f"at least {2 * _STEP}, not {height} x {width}; pad or crop them."
        )
    return _scatter(images, _filters(height + 2 * _STEP))


def scattering_features(
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch features"]:
    """Scattering coefficients of each colour, group-normalised and flattened.

    Args:
        images: ``[batch, side, side, channels]``, pixels in [0, 1].

    Returns:
        ``[batch, channels * 81 * (side/4)^2]``, float32: 3,969 for 28 x 28 grey images,
        15,552 for 32 x 32 in colour.

    Raises:
        ValueError: as for `scatter`.

    Privacy:
        As for `scatter`: each row depends on its own image alone.

    Example:
        >>> scattering_features(jnp.ones((1, 32, 32, 3))).shape
        (1, 15552)

    Reference:
        Tramer and Boneh, "Differentially Private Learning Needs Better Features (or
        Much More Data)", ICLR 2021.
    """
    batch, height, width, channels = images.shape
    grey = jnp.moveaxis(images, -1, 1).reshape(batch * channels, height, width)
    found = scatter(grey)
    maps = found.reshape(batch, channels * NUM_COEFFICIENTS, *found.shape[-2:])
    return group_norm(maps).reshape(batch, -1)


def photo_features(
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch features"]:
    """`scattering_features` for photographs: opponent colours, and no left or right.

    Red, green and blue, which are nearly the same picture three times, become a grey
    picture and two differences of colours. What is returned is the mean over an image
    and its mirror image: half of the directions vanish, and with them the noise that a
    private linear model would get there. Not for digits or letters, whose class is
    another one in a mirror.

    Args:
        images: as for `scattering_features`; colours are turned where there are three.

    Returns:
        Of the same shape as `scattering_features` gives.

    Raises:
        ValueError: as for `scatter`.

    Privacy:
        As for `scatter`: each row depends on its own image alone.

    Example:
        >>> image = jnp.arange(64.0).reshape(1, 8, 8, 1) / 64
        >>> one, other = map(photo_features, (image, image[:, :, ::-1]))
        >>> bool(jnp.allclose(one, other))
        True
    """
    if images.shape[-1] == len(_OPPONENT):
        images = images @ _OPPONENT
    there = scattering_features(images)
    return (there + scattering_features(images[:, :, ::-1])) / 2


def group_norm(
    maps: Float[Array, "batch channels rows columns"], num_groups: int = NUM_GROUPS
) -> Float[Array, "batch channels rows columns"]:
    """Takes mean and deviation out of each group of consecutive channels.

    Args:
        maps: features of images.
        num_groups: how many groups; divides the number of channels.

    Returns:
        The same shape; each group of each image has mean 0 and, but for a floor of 1e-5
        under the variance, deviation 1.

    Raises:
        ValueError: if the groups do not divide the channels.

    Privacy:
        Each image is normalised by itself; nothing is shared over the batch.

    Example:
        >>> maps = jnp.arange(8.0).reshape(1, 2, 2, 2)
        >>> [round(float(m), 3) for m in group_norm(maps, 2)[0].mean((1, 2))]
        [0.0, 0.0]

    Reference:
        Wu and He, "Group Normalization", ECCV 2018.
    """
    channels = maps.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"{num_groups} groups do not divide {channels} channels; use a divisor."
        )
    grouped = maps.reshape(maps.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred / jnp.sqrt(variance + _VARIANCE_FLOOR)).reshape(maps.shape)


@jax.jit
def _scatter(images: Array, filters: _Filters) -> Array:
    border = ((0, 0), (_STEP, _STEP), (_STEP, _STEP))
    padded = jnp.pad(images, border, mode="reflect")
    spectrum = _fft_of_real(padded)[:, None]
    fine = jnp.abs(jnp.fft.ifft2(spectrum * filters.fine))
    coarse = _coarse_modulus(spectrum, filters)
    of_fine = _coarse_modulus(_fft_of_real(fine)[:, :, None], filters)
    second = of_fine.reshape(len(images), NUM_ANGLES**2, *coarse.shape[-2:])
    parts = zip((padded[:, None], fine, coarse, second), (0, 0, 1, 1), strict=True)
    return jnp.concatenate([_low(u, filters.low[k]) for u, k in parts], axis=1)


def _coarse_modulus(spectrum: Array, filters: _Filters) -> Array:
    """|u * wavelet| at every second pixel, where the spectrum's halves coincide."""
    product = spectrum * filters.coarse
    half = product.shape[-1] // 2
    folded = product.reshape(*product.shape[:-2], 2, half, 2, half).mean((-4, -2))
    return jnp.abs(jnp.fft.ifft2(folded))


def _fft_of_real(u: Array) -> Array:
    """The whole spectrum of a real signal, of which half the columns are computed."""
    some = jnp.fft.rfft2(u)
    others = some[..., 1 : (u.shape[-1] + 1) // 2]
    mirrored = jnp.roll(others[..., ::-1, ::-1], 1, axis=-2)
    return jnp.concatenate([some, jnp.conj(mirrored)], axis=-1)


def _low(u: Array, samples: np.ndarray | Array) -> Array:
    found = u.reshape(*u.shape[:2], -1) @ samples
    side = round(samples.shape[1] ** 0.5)
    return found.reshape(*u.shape[:2], side, side)


@lru_cache(maxsize=8)
def _filters(side: int) -> _Filters:
    """Filters for padded images; in double precision, then float32."""
    turns = [(NUM_ANGLES // 2 - 1 - k) * np.pi / NUM_ANGLES for k in range(NUM_ANGLES)]
    waves = [
        np.stack([_morlet_spectrum(side, scale, turn) for turn in turns])
        for scale in range(NUM_SCALES)
    ]
    low = tuple(_low_pass(side, level) for level in range(2))
    return _Filters(*jax.tree.map(lambda a: a.astype(np.float32), (*waves, low)))


def _morlet_spectrum(side: int, scale: int, turn: float) -> np.ndarray:
    """A wave under a Gaussian, less as much Gaussian as makes its mean zero."""
    width, frequency = _SIGMA * 2**scale, _FREQUENCY / 2**scale
    wave = _on_torus(partial(_gabor, width, turn, frequency), side)
    envelope = _on_torus(partial(_gabor, width, turn, 0.0), side)
    morlet = wave - wave.sum() / envelope.sum() * envelope
    return np.fft.fft2(morlet * _SLANT / (2 * _PI * width**2)).real


def _gabor(
    width: float, turn: float, frequency: float, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    along = rows * np.cos(turn) + columns * np.sin(turn)
    across = columns * np.cos(turn) - rows * np.sin(turn)
    bell = (along**2 + (_SLANT * across) ** 2) / (2 * width**2)
    return np.exp(1j * frequency * along - bell)


def _on_torus(function, side: int) -> np.ndarray:
    """A function of (row, column) wrapped around: the sum of its 25 nearest copies."""
    grid = np.arange(-2 * side, 3 * side, dtype=np.float64)
    values = function(grid[:, None], grid[None, :])
    return values.reshape(5, side, 5, side).sum((0, 2))


def _low_pass(side: int, level: int) -> np.ndarray:
    """Maps a signal of side / 2^level to Gaussian means at every fourth pixel.

    The Gaussian is a product of one for rows and one for columns; at level 1 its
    spectrum is cut to the frequencies that grid has. The border's samples are left out.
    """
    width = _SIGMA * 2 ** (NUM_SCALES - 1)
    grid = np.arange(-2 * side, 3 * side, dtype=np.float64)
    bell = np.exp(-(grid**2) / (2 * width**2)).reshape(5, side).sum(0)
    spectrum = np.fft.fft(bell / np.sqrt(2 * _PI * width**2)).real
    size, step = side >> level, _STEP >> level
    kept = np.concatenate([spectrum[: size - size // 2], spectrum[side - size // 2 :]])
    kernel = np.fft.ifft(kept).real
    rows = np.arange(1, side // _STEP - 1)[:, None] * step
    one_axis = kernel[(rows - np.arange(size)) % size]
    both = np.einsum("ia,jb->abij", one_axis, one_axis)
    return both.reshape(size**2, -1)
