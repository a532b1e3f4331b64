"""One layer of convolutions whose filters are patches of public photographs.

Small squares of an image are centred, scaled by their own contrast and compared with
whitened patches of photographs; what exceeds a threshold, of either sign, is averaged
over a 3 x 3 grid and over the mirror image. A linear map that was made from crops of
the same photographs then turns the 18,432 means into 4,096 features of even strength.
Nothing is learnt from the images that go through.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dp_ilg.experiments.data.images.photographs import (
    crops,
    digest,
    patches,
    photographs,
)
from dp_ilg.experiments.data.kept import DTYPE, Kind, kept

_ROWS = 250  # images at a time: one shape, so compiled once
_FILTERS = 128  # at a time
_WEAKEST = 1e-4  # of the strongest variance: none is taken to be weaker
_SHORT = np.float32(1e-6)


class Bank(NamedTuple):
    """Whitened filters.

    Attributes:
        kernel: ``[size * size * 3, filters]``, applied to normalised patches.
        offset: ``[filters]``, taken off.

    Privacy: of photographs alone.

    Example:
        >>> Bank(np.zeros((108, 4)), np.zeros(4)).kernel.shape
        (108, 4)
    """

    kernel: Any
    offset: Any


@dataclass(frozen=True)
class PatchFeatures:
    """What a row of `PATCH_FEATURES` is made of; every number was chosen by hand.

    Attributes:
        filters: how many patches are filters; each gives two maps, one a sign.
        size: side of a patch.
        grid: maps are averaged over a grid of so many rows and columns.
        threshold: what a response must exceed.
        contrast: added to the variance of a patch, of pixels in [0, 1].
        ridge: added to the variances when patches are whitened.
        samples: patches that the whitening is computed from.
        crops: small pictures that the linear map is computed from.
        width: how many features are kept, at most as many as crops.
        whitening: 0 keeps the variances of the crops, 0.5 makes them equal.
        norm: length of every row of features.
        power: what the means are raised to before the linear map; 0.5, the square
            root, keeps the few strong ones from drowning the others.

    Example:
        >>> PatchFeatures().num_means
        18432
    """

    filters: int = 1024
    size: int = 6
    grid: int = 3
    threshold: float = 0.25
    contrast: float = 0.0015
    ridge: float = 0.1
    samples: int = 100_000
    crops: int = 6000
    width: int = 4096
    whitening: float = 0.3
    norm: float = 10.0
    power: float = field(default=1.0, repr=False)  # `_tag` names it

    @property
    def num_means(self) -> int:
        """How many numbers an image is turned into before the linear map."""
        return 2 * self.filters * self.grid**2

    def of(self, images: Any, name: str, folder: Path) -> np.ndarray:
        """The features of images, mapped from the cache where they have been computed.

        Args:
            images: float32 ``[N, side, side, 3]`` in [0, 1].
            name: of the row, for the file and for messages.
            folder: of the cache.

        Returns:
            float16 ``[N, width]``, each row of length `norm`.

        Raises:
            ValueError: for images of another shape.
            DataError: if the photographs are not installed.

        Privacy:
            Filters and linear map are functions of the photographs and of constants,
            so row i is a function of image i alone and costs nothing. The file is as
            private as the images.

        Example:
            >>> PatchFeatures().of(np.zeros((1, 8, 8, 1)), "photo_patches", Path())
            Traceback (most recent call last):
            ValueError: data.features is 'photo_patches', which takes square images ...
        """
        shape = images.shape[1:]
        if shape[2:] != (3,) or shape[0] != shape[1] or shape[0] < 2 * self.size:
            raise ValueError(
                f"data.features is {name!r}, which takes square images of 3 colours "
                f"and at least {2 * self.size} pixels a side, not {list(shape)}; "
                "choose other features."
            )
        photos = photographs()
        tag = f"{self._tag} {digest(photos)} float16"
        kind = Kind(name, tag, self.width)
        return kept(images, kind, lambda: self._chunks(images, tag, folder), folder)

    @property
    def _tag(self) -> str:
        """As it was before there were powers, so that old files are still found."""
        return str(self) if self.power == 1 else f"{self} power {self.power}"

    def _chunks(self, images: Any, tag: str, folder: Path) -> Iterator[np.ndarray]:
        bank = make_bank(self, photographs())
        side = images.shape[1]
        basis = np.asarray(_kept_basis(self, bank, side, tag, folder), np.float32)
        for means in _means(self, bank, images):
            found = means @ basis[:-1] - basis[-1]
            length = np.linalg.norm(found, axis=1, keepdims=True)
            yield (found * (self.norm / np.maximum(length, _SHORT))).astype(DTYPE)


def make_bank(chosen: PatchFeatures, photos: tuple[np.ndarray, ...]) -> Bank:
    """Makes filters of photographs: patches, whitened by the covariance of patches.

    Args:
        chosen: how many, and how.
        photos: bytes, ``[height, width, 3]`` each.

    Returns:
        The filters, each of length 1 in whitened coordinates.

    Privacy: a function of the photographs and of constants.

    Example:
        >>> photos = (np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),)
        >>> small = PatchFeatures(filters=4, samples=300)
        >>> make_bank(small, photos).kernel.shape
        (108, 4)

    Reference: Coates and Ng 2011, "The importance of encoding versus training with
    sparse coding and vector quantization"; Thiry et al., ICLR 2021.
    """
    sample = _normalised(patches(photos, chosen.samples, chosen.size, 0), chosen)
    mean = sample.mean(0)
    values, vectors = np.linalg.eigh(np.cov(sample.T).astype(np.float64))
    whiten = (vectors / np.sqrt(np.maximum(values, 0) + chosen.ridge)) @ vectors.T
    found = _normalised(patches(photos, chosen.filters, chosen.size, 1), chosen)
    found = (found - mean) @ whiten
    found /= np.linalg.norm(found, axis=1, keepdims=True) + _SHORT
    kernel = whiten @ found.T
    return Bank(kernel.astype(np.float32), (mean @ kernel).astype(np.float32))


def _normalised(squares: np.ndarray, chosen: PatchFeatures) -> np.ndarray:
    flat = squares.reshape(len(squares), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.sqrt(flat.var(1, keepdims=True) + chosen.contrast)


def patch_means(
    chosen: PatchFeatures,
    bank: Bank,
    images: Float[Array, "batch side side 3"],
) -> Float[Array, "batch means"]:
    """What exceeds the threshold, averaged over each place of a grid, to a power.

    Args:
        chosen: sizes, threshold and power.
        bank: the filters.
        images: in [0, 1].

    Returns:
        ``[batch, 2 * grid^2 * filters]``: the positive, then the negative excesses,
        place by place; the mean over an image and its mirror image, raised to
        `chosen.power`.

    Privacy: row i is a function of image i and the filters alone.

    Example:
        >>> small = PatchFeatures(filters=4, grid=2)
        >>> bank = Bank(jnp.ones((108, 4)), jnp.zeros(4))
        >>> patch_means(small, bank, jnp.ones((2, 16, 16, 3))).shape
        (2, 32)
    """
    size, places = chosen.size, images.shape[1] - chosen.size + 1
    pool = jnp.asarray(_pool(places, chosen.grid))
    blocks = jax.tree.map(partial(_in_blocks, chosen.filters), bank)

    def one(image: Array) -> Array:
        shifted = [
            image[i : i + places, j : j + places]
            for i in range(size)
            for j in range(size)
        ]
        flat = jnp.concatenate(shifted, axis=-1).reshape(places**2, -1)
        flat = flat - flat.mean(1, keepdims=True)
        square = jnp.square(flat).mean(1, keepdims=True)
        flat = flat / jnp.sqrt(square + chosen.contrast)

        def some(block: Bank) -> Array:
            found = flat @ block.kernel
            above = pool @ jnp.maximum(found - (block.offset + chosen.threshold), 0)
            below = pool @ jnp.maximum((block.offset - chosen.threshold) - found, 0)
            return jnp.stack([above, below])

        return jnp.moveaxis(jax.lax.map(some, blocks), 0, 2).reshape(-1)

    both = [jax.lax.map(one, x) for x in (images, images[:, :, ::-1])]
    means = (both[0] + both[1]) / 2
    return means if chosen.power == 1 else means**chosen.power


def _in_blocks(filters: int, bank: Any) -> Array:
    """Filters as ``[blocks, ..., few]``: what responds then fits the cache."""
    few = math.gcd(filters, _FILTERS)
    return jnp.moveaxis(jnp.asarray(bank).reshape(*bank.shape[:-1], -1, few), -2, 0)


@functools.lru_cache(maxsize=8)
def _pool(places: int, grid: int) -> np.ndarray:
    """Means over a grid of rectangles that share no place."""
    edges = [round(i * places / grid) for i in range(grid + 1)]
    axis = np.zeros((grid, places), np.float32)
    for i in range(grid):
        axis[i, edges[i] : edges[i + 1]] = 1 / (edges[i + 1] - edges[i])
    return np.einsum("ia,jb->ijab", axis, axis).reshape(grid**2, places**2)


def _means(
    chosen: PatchFeatures, bank: Bank, images: np.ndarray
) -> Iterator[np.ndarray]:
    compute = jax.jit(partial(patch_means, chosen))
    for begin in range(0, len(images), _ROWS):
        rows = np.asarray(images[begin : begin + _ROWS], np.float32)
        missing = ((0, _ROWS - len(rows)), (0, 0), (0, 0), (0, 0))
        yield np.asarray(compute(bank, np.pad(rows, missing)))[: len(rows)]


def _kept_basis(
    chosen: PatchFeatures, bank: Bank, side: int, tag: str, folder: Path
) -> np.ndarray:
    """`public_basis` of crops of the photographs, in the cache as features are."""
    pictures = crops(photographs(), chosen.crops, side, 2)
    kind = Kind("photo_basis", f"basis {tag}", chosen.width)

    def chunks() -> Iterator[np.ndarray]:
        means = np.concatenate([*_means(chosen, bank, pictures)])
        yield public_basis(means, chosen.width, chosen.whitening)

    own = folder / "photographs"  # the folder of features is locked while they are made
    return kept(pictures, kind, chunks, own, rows=chosen.num_means + 1)


def public_basis(means: np.ndarray, width: int, whitening: float) -> np.ndarray:
    """Principal directions of public rows, evened out, and where their mean lies.

    Args:
        means: public rows, ``[rows, k]``; fewer rows than columns.
        width: how many directions are kept, at most as many as rows.
        whitening: each direction is divided by its variance, as a share of the
            largest and at least 1e-4, to this power.

    Returns:
        float32 ``[k + 1, width]``: the directions as columns, and the mean's
        coordinates as last row, which is to be taken off.

    Privacy: of what it is given alone; give it nothing private.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
        >>> public_basis(rows, 3, 0.5).shape
        (10, 3)
    """
    mean = means.mean(0)
    centred = means - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    strongest = slice(None, -width - 1, -1)
    kept_values = np.maximum(values[strongest], _WEAKEST * values[-1])
    across = vectors[:, strongest] / np.sqrt(kept_values)
    factors = (kept_values / values[-1]) ** -whitening
    directions = (centred.T @ across) * factors
    return np.concatenate([directions, (mean @ directions)[None]]).astype(np.float32)


PATCH_FEATURES: dict[str, PatchFeatures] = {
    "photo_patches": PatchFeatures(),
    "photo_patch_roots": PatchFeatures(width=2048, power=0.5),
}
